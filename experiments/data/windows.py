"""Windows over a stream of tokens, addressed by number: the position in the data is the step number.

The stream of a split is a seeded permutation of its documents, each written as BOS and its tokens, or as its
tokens alone where the tokenizer has no BOS. Bytes are tokens too. A document that is not UTF-8 may contain the
value of BOS as data; segment ids mark where documents begin. Window i holds stream positions i*T to i*T + T, both
included; the model reads the first T and predicts the last T, so every position but the first is predicted once
per epoch. Batch s is computed from s alone: it depends neither on the number of processes nor on where a run was
interrupted.

A window or batch is a dict of
  tokens           int32 [..., T + 1]   tokens, or BOS where a document begins; 0 in padding
  segment_ids      int32 [..., T + 1]   1, 2, ... number the documents within the window; 0 is padding
  is_continuation  bool [...]           the window begins in the middle of a document
  loss_mask        bool [..., T + 1]    what follows the document's `loss_marker`; present only if there is one
  num_bytes        int32 [..., T + 1]   bytes of text that a token stands for; not present where tokens are bytes
A position is a target if its segment id is not 0 and equals that of the position before it, and loss_mask, if
present, is True there.
"""
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from experiments.data.tokenizer import ByteTokenizer, Tokenizer
from experiments.errors import UsageError

SEARCH_BYTES = 65_536  # read at once when looking for the marker

Batch = dict[str, np.ndarray]
BYTES = ByteTokenizer()


class Documents(Protocol):
    """Documents of bytes or of ids, such as a DocumentSplit or a TokenSplit."""

    lengths: np.ndarray  # int64, in their own units

    def read(self, document: int, start: int, stop: int) -> np.ndarray: ...


class WindowSource:
    """All windows of a split, with random access."""

    def __init__(
        self, split: Documents, sequence_length: int, seed: int, *, loss_marker: bytes = b"",
        tokenizer: Tokenizer = BYTES,
    ) -> None:
        """Lays the documents out in an order drawn from `seed`.

        Args:
          split: its documents are ids of `tokenizer`.
          sequence_length: T, at least 1.
          loss_marker: the targets of a document are the tokens that begin after the marker's first occurrence; a
            document without it has none. b"" makes all tokens targets.
        Raises:
          UsageError: no document has the marker.
        """
        if sequence_length < 1:
            raise UsageError(f"config.data.sequence_length {sequence_length} must be at least 1: a shorter window "
                             "predicts nothing")
        self.sequence_length = sequence_length
        self._split, self._tokenizer = split, tokenizer
        self._counts_bytes = not isinstance(tokenizer, ByteTokenizer)
        self._num_bos = int(tokenizer.bos is not None)
        # RandomState rather than Generator: numpy promises never to change its numbers.
        self._order = np.random.RandomState(seed).permutation(len(split.lengths))
        lengths = split.lengths[self._order] + self._num_bos
        self._starts = np.cumsum(lengths) - lengths  # stream position of each BOS, or first token
        self._stream_length = int(lengths.sum())
        if self._stream_length < 2:
            raise UsageError("a split has a single token of text, which leaves none to predict; "
                             "change config.data.source")
        self._marker = loss_marker
        self._target_starts = np.full(len(lengths), -1, np.int64)  # token of each document; -1: not searched yet
        has_targets = (self._target_start(document) < split.lengths[document] for document in self._order)
        if loss_marker and not any(has_targets):
            marker = loss_marker.decode(errors="backslashreplace")
            raise UsageError(f"config.data.loss_after {marker!r}: none of the {len(lengths)} documents of a split "
                             "has text after it; change it, or config.data.source")

    def __len__(self) -> int:
        return -(-(self._stream_length - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is not one of the {len(self)} windows")
        window = self.empty_window()
        start = int(index) * self.sequence_length
        stop = min(start + self.sequence_length + 1, self._stream_length)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        window["is_continuation"][...] = self._starts[first] < start
        position = start
        for rank in itertools.count(first):
            piece = self._read(rank, position, stop)
            here = slice(position - start, position - start + len(piece))
            window["tokens"][here], window["segment_ids"][here] = piece, rank - first + 1
            if self._marker:
                target_start = self._starts[rank] + self._num_bos + self._target_start(self._order[rank])
                window["loss_mask"][here] = np.arange(position, position + len(piece)) >= target_start
            if self._counts_bytes:
                window["num_bytes"][here] = self._tokenizer.num_bytes[piece]
                if position == self._starts[rank] and self._num_bos:
                    window["num_bytes"][here.start] = 0  # BOS is no text
            position += len(piece)
            if position == stop:
                return window

    def empty_window(self) -> Batch:
        """Returns a window of padding."""
        size = self.sequence_length + 1
        window = {"tokens": np.zeros(size, np.int32), "segment_ids": np.zeros(size, np.int32),
                  "is_continuation": np.zeros((), bool)}
        if self._marker:
            window["loss_mask"] = np.zeros(size, bool)
        if self._counts_bytes:
            window["num_bytes"] = np.zeros(size, np.int32)
        return window

    def num_bytes(self, windows: np.ndarray) -> np.ndarray:
        """Counts the bytes of text, without BOS, that each of these windows predicts: int64 [n]."""
        if self._counts_bytes:
            return np.array([_predicted_bytes(self[window]) for window in windows], np.int64)
        if self._marker:
            return np.array([np.count_nonzero(self[window]["loss_mask"][1:]) for window in windows], np.int64)
        first = windows * self.sequence_length + 1
        end = np.minimum(first + self.sequence_length, self._stream_length)
        return end - first - (np.searchsorted(self._starts, end) - np.searchsorted(self._starts, first))

    def _read(self, rank: int, start: int, stop: int) -> np.ndarray:
        """Returns stream positions `start` to `stop`, or to the end of the rank-th document."""
        document, first = self._order[rank], int(self._starts[rank]) + self._num_bos
        stop = min(stop - first, int(self._split.lengths[document]))
        if start >= first:
            return self._split.read(document, start - first, stop)
        text = self._split.read(document, 0, stop)
        return np.concatenate([np.array([self._tokenizer.bos], text.dtype), text])

    def _target_start(self, document: int) -> int:
        """Returns the token of a document that begins after the first marker; its length if there is none."""
        if self._target_starts[document] < 0:
            self._target_starts[document] = self._find_target_start(document)
        return int(self._target_starts[document])

    def _find_target_start(self, document: int) -> int:
        length, size = int(self._split.lengths[document]), len(self._marker)
        if self._counts_bytes:
            ids = self._split.read(document, 0, length)
            found = self._tokenizer.decode(ids).find(self._marker)
            token_ends = np.cumsum(self._tokenizer.num_bytes[ids])
            return int(np.searchsorted(token_ends[:-1], found + size)) + 1 if found >= 0 else length
        for start in range(0, length, SEARCH_BYTES):  # pieces overlap, so no marker is missed
            stop = min(start + SEARCH_BYTES + size - 1, length)
            found = self._split.read(document, start, stop).tobytes().find(self._marker)
            if found >= 0:
                return start + found + size
        return length


class BatchSource:
    """Training batches by step: `batches[s]` is this process's part of global batch s, for any s >= 0.

    Windows are reshuffled every epoch. Batches continue across the end of an epoch, so none is short.
    """

    def __init__(
        self,
        windows: WindowSource,
        batch_size: int,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Shuffles the windows; raises UsageError if processes cannot share the global `batch_size` equally."""
        import grain

        self._rows = _rows_of_process(batch_size, process_index, process_count)
        self.steps_per_epoch = len(windows) / batch_size  # rarely an integer
        self._batch_size = batch_size
        self._windows = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f"step {step} is negative; steps count from 0")
        return _stack([self._windows[step * self._batch_size + row] for row in self._rows])


class EvaluationSource:
    """A fixed choice of windows from all over the split, in full batches; the last is filled up with padding.

    The choice depends only on `windows` and `num_bytes`, so runs can be compared. Like `BatchSource` this is a
    sequence of batches, but a finite one.
    """

    def __init__(
        self,
        windows: WindowSource,
        batch_size: int,
        *,
        num_bytes: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Chooses windows until they predict `num_bytes` bytes of text, or all if the split has fewer."""
        shuffled = np.random.RandomState(0).permutation(len(windows))
        predicted = np.zeros(0, np.int64)
        while predicted.sum() < num_bytes and len(predicted) < len(shuffled):  # counting may read text
            more = shuffled[len(predicted) : 2 * len(predicted) + 64]
            predicted = np.concatenate([predicted, windows.num_bytes(more)])
        predicted = np.cumsum(predicted)
        num_windows = min(int(np.searchsorted(predicted, num_bytes)) + 1, len(predicted))
        self.num_bytes = int(predicted[num_windows - 1])  # predicted by the batches of all processes
        if not self.num_bytes:
            raise UsageError("no document has a second token, so there is none to predict; "
                             "change config.data.source")
        self._chosen = shuffled[:num_windows]
        self._rows = _rows_of_process(batch_size, process_index, process_count)
        self._batch_size = batch_size
        self._windows = windows

    def __len__(self) -> int:
        return -(-len(self._chosen) // self._batch_size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} is not one of the {len(self)} evaluation batches")
        numbers = range(index * self._batch_size, len(self._chosen))
        chosen = [self._chosen[numbers[row]] for row in self._rows if row < len(numbers)]
        padding = [self._windows.empty_window()] * (len(self._rows) - len(chosen))
        return _stack([self._windows[window] for window in chosen] + padding)


def prefetch(batches: BatchSource, start_step: int, depth: int = 2) -> Iterator[Batch]:
    """Yields batches[start_step], batches[start_step + 1], ... without end; a thread reads `depth` ahead.

    Errors of the thread are raised here. Closing the iterator waits for the batch being read.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        pending = deque(pool.submit(batches.__getitem__, start_step + i) for i in range(depth))
        for step in itertools.count(start_step + depth):
            batch = pending.popleft().result()
            pending.append(pool.submit(batches.__getitem__, step))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _predicted_bytes(window: Batch) -> int:
    segment_ids = window["segment_ids"]
    is_target = (segment_ids[1:] == segment_ids[:-1]) & (segment_ids[1:] > 0)
    if "loss_mask" in window:
        is_target &= window["loss_mask"][1:]
    return int(window["num_bytes"][1:][is_target].sum())


def _stack(windows: list[Batch]) -> Batch:
    return {key: np.stack([window[key] for window in windows]) for key in windows[0]}


def _rows_of_process(batch_size: int, process_index: int, process_count: int) -> range:
    """Returns the rows of a global batch that this process reads: equal slices in process order."""
    if batch_size < 1 or batch_size % process_count:
        raise UsageError(f"batch size {batch_size} cannot be divided among {process_count} processes; "
                         f"set config.data.batch_size to a multiple of {process_count}")
    size = batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)
