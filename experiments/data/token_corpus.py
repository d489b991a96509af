"""A corpus in tokens: encoded on first use, and kept beside the corpus that it was made from.

  directory/tokens.json             {"fingerprint", "dtype", "train": {"names", "lengths"}, "test": the same}
  directory/train.ids, test.ids     the ids of all documents, one after another

The directory is named by a hash of both fingerprints, that of the corpus and that of the tokenizer.
"""
import hashlib
import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.corpus import Corpus, DocumentSplit, appears_whole
from experiments.data.sources import STORED_NAMES, Split
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UsageError

FORMAT_VERSION = 1  # of the prepared directory; a change here encodes every corpus anew


def load_tokens(corpus: Corpus, tokenizer: Tokenizer) -> "TokenCorpus":
    """Opens the tokens of a corpus, and encodes it on first use.

    Bytes that the vocabulary cannot write are left out; how many is printed, and part of the fingerprint.

    Raises:
      UsageError: the corpus' directory cannot be written, or a split has no document left.
    """
    key = json.dumps([FORMAT_VERSION, corpus.fingerprint, tokenizer.fingerprint], sort_keys=True)
    name = f"{corpus.directory.name.rpartition('-')[0]}-tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    directory = corpus.directory.with_name(name)
    if not directory.exists():
        _prepare(corpus, tokenizer, directory)
    return TokenCorpus(directory)


class TokenCorpus:
    """The tokens of a corpus on disk."""

    def __init__(self, directory: Path) -> None:
        index = json.loads((directory / "tokens.json").read_text(encoding="utf-8"))
        # That of the text, with {"tokenizer", "tokens", "unwritable_bytes"}.
        self.fingerprint: dict[str, Any] = index["fingerprint"]
        self._splits = {
            split: TokenSplit(directory / f"{stored}.ids", np.dtype(index["dtype"]), **index[stored])
            for split, stored in STORED_NAMES.items()
        }

    def split(self, name: Split) -> "TokenSplit":
        return self._splits[name]


class TokenSplit:
    """The documents of one split in tokens, read as a DocumentSplit is."""

    def __init__(self, path: Path, dtype: np.dtype, *, names: list[str], lengths: list[int]) -> None:
        self.names = names
        self.lengths = np.asarray(lengths, dtype=np.int64)  # tokens per document
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._path, self._dtype = path, dtype

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start` to `stop` of a document, [stop - start]."""
        if not 0 <= start <= stop <= self.lengths[document]:
            raise IndexError(f"tokens {start}:{stop} are not within the {self.lengths[document]} tokens of "
                             f"document {document}, {self.names[document]}")
        first = int(self._starts[document])
        return np.array(self._ids[first + start : first + stop])

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.memmap(self._path, self._dtype, mode="r")


def _prepare(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> None:
    splits = {stored: corpus.split(split) for split, stored in STORED_NAMES.items()}
    size = sum(int(split.lengths.sum()) for split in splits.values())
    print(f"encoding {corpus.fingerprint['files']:,} documents, {size / 1e6:.1f} MB, once, into {directory}",
          flush=True)
    start, num_tokens, num_unwritable = time.perf_counter(), 0, 0
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
    index: dict[str, Any] = {"dtype": dtype.name}
    with appears_whole(directory) as made:
        made.mkdir()
        for stored, split in splits.items():
            index[stored], unwritable = _write_split(split, tokenizer, dtype, made / f"{stored}.ids")
            num_tokens, num_unwritable = num_tokens + sum(index[stored]["lengths"]), num_unwritable + unwritable
        index["fingerprint"] = corpus.fingerprint | {
            "tokenizer": tokenizer.fingerprint, "tokens": num_tokens, "unwritable_bytes": num_unwritable}
        (made / "tokens.json").write_text(json.dumps(index), encoding="utf-8")
    left_out = f"; left out {num_unwritable:,} bytes that no token stands for" if num_unwritable else ""
    print(f"encoded as {num_tokens:,} tokens in {time.perf_counter() - start:.1f} s{left_out}", flush=True)


def _write_split(
    split: DocumentSplit, tokenizer: Tokenizer, dtype: np.dtype, path: Path
) -> tuple[dict[str, list], int]:
    """Writes the ids of all documents; returns the entry of the index, and the number of unwritable bytes."""
    names, lengths, num_unwritable = [], [], 0
    with path.open("wb") as file:
        for document, name in enumerate(split.names):
            text = split.read(document, 0, int(split.lengths[document])).tobytes()
            writable = tokenizer.without_unwritable(text)
            ids = tokenizer.encode(writable)
            num_unwritable += len(text) - len(writable)
            if len(ids):  # a document may be of unwritable bytes alone
                file.write(ids.astype(dtype).tobytes())
                names.append(name)
                lengths.append(len(ids))
    if not names:
        raise UsageError(f"the tokenizer's vocabulary can write no byte of the {len(split.names)} documents of a "
                         "split; change config.data.tokenizer or config.data.source")
    return {"names": names, "lengths": lengths}, num_unwritable
