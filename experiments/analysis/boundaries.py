"""Boundaries and prediction losses of a model on a text, aligned with the bytes of the text."""
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from experiments.analysis.chunked_text import ChunkedText, StageChunks
from experiments.config import RunConfig
from experiments.data import ByteTokenizer, Tokenizer
from experiments.data.windows import BYTES
from hnet import HNetLM, StageOutput

ROWS = 8  # windows per call; fewer are padded to this, so that the model compiles once
LARGEST_LOGITS = 2**27  # numbers per call: a large vocabulary makes do with fewer rows
SHORTEST_WINDOW = 16


def chunk_texts(
    config: RunConfig, params: Any, texts: list[tuple[str, bytes]], tokenizer: Tokenizer = BYTES, *,
    on_call: Callable[[int, int], None] | None = None,
) -> tuple[ChunkedText, ...]:
    """Runs the model over (title, text) pairs and returns every stage's boundaries and every byte's nats.

    Stages run at full capacity on windows as long as in training. Neighbouring windows overlap by half, and a
    token's results come from the window that has at least half its length before it: the first token of a window
    always starts a chunk, which says nothing about the text. Every text begins with a BOS of its own, if the
    tokenizer has one.

    Args:
      on_call: told after each call of the model how many are done, of how many.
    Raises:
      UsageError: the tokenizer's vocabulary cannot write a text.
    """
    model = HNetLM(config.model.at_full_capacity())
    read = jax.jit(lambda *arguments: _read_windows(model, *arguments))
    readings = [_Reading(text, tokenizer, num_stages=len(config.model.stages) - 1) for _, text in texts]
    longest = max((len(reading.stream) for reading in readings), default=0)
    size = min(config.data.sequence_length, max(SHORTEST_WINDOW, 1 << (longest - 1).bit_length()))
    rows = max(1, min(ROWS, LARGEST_LOGITS // (size * config.model.vocab_size)))
    windows = [(reading, start) for reading in readings for start in reading.window_starts(size)]
    for first in range(0, len(windows), rows):
        batch = windows[first : first + rows]
        tokens = np.zeros((rows, size + 1), np.int32)
        is_token = np.zeros((rows, size), np.int32)
        for row, (reading, start) in enumerate(batch):
            piece = reading.stream[start : start + size + 1]
            tokens[row, : len(piece)] = piece
            is_token[row, : len(piece)] = 1
        nats, stages = jax.device_get(read(params, tokens, is_token))
        for row, (reading, start) in enumerate(batch):
            reading.add(start, size, nats[row], byte_boundaries(stages, row))
        if on_call:
            on_call(first // rows + 1, -(-len(windows) // rows))
    return tuple(reading.finish(title) for reading, (title, _) in zip(readings, texts, strict=True))


def byte_boundaries(
    stages: Mapping[str, StageOutput], row: int
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Maps each stage to (byte position, boundary_prob, boundary_mask) of the tokens it saw in this row.

    Positions count tokens of stage 0. The run must have had full capacity; otherwise slots and boundaries differ.
    """
    position = np.flatnonzero(np.asarray(stages["stage0"].is_real[row])) if stages else None
    found = {}
    for name, stage in stages.items():
        mask = np.asarray(stage.is_real[row])
        boundary = np.asarray(stage.boundary_mask[row])[mask]
        found[name] = position, np.asarray(stage.boundary_prob[row])[mask], boundary
        position = position[boundary]
    return found


def _read_windows(
    model: HNetLM, params: Any, tokens: jax.Array, is_token: jax.Array
) -> tuple[jax.Array, dict[str, StageOutput]]:
    """Reads the first t of t + 1 tokens per row; returns the nats of the last t [b, t], and the stages."""
    output = model.apply({"params": params}, tokens[:, :-1], is_token)
    return optax.softmax_cross_entropy_with_integer_labels(output.logits, tokens[:, 1:]), output.stages


class _Reading:
    """Results so far for one text, at each position of its stream: BOS, if there is one, and then its tokens."""

    def __init__(self, text: bytes, tokenizer: Tokenizer, num_stages: int) -> None:
        ids = tokenizer.encode(text)
        bos = [] if tokenizer.bos is None else [tokenizer.bos]
        self.text = text
        self.stream = np.concatenate([np.array(bos, np.int32), ids])
        self._num_bytes, self._num_bos = tokenizer.num_bytes[ids], len(bos)
        self._are_bytes = isinstance(tokenizer, ByteTokenizer)
        self._next_nats = np.full(len(self.stream), np.nan)  # of the position after this one
        self._prob = {f"stage{index}": self._next_nats.copy() for index in range(num_stages)}
        self._boundary = {name: np.zeros(len(self.stream), bool) for name in self._prob}

    def window_starts(self, size: int) -> range:
        half = size // 2
        return range(0, max(len(self.stream) - half, 1), half)

    def add(self, start: int, size: int, nats: np.ndarray, boundaries: dict) -> None:
        """Stores the results of the window at `start` for the positions that are read from it."""
        skip = size // 2 if start else 0
        stop = min(size, len(self.stream) - start)
        self._next_nats[start + skip : start + stop] = nats[skip:stop]
        for name, (position, prob, boundary) in boundaries.items():
            read = position >= skip
            self._prob[name][start + position[read]] = prob[read]
            self._boundary[name][start + position[read]] = boundary[read]

    def finish(self, title: str) -> ChunkedText:
        """Returns the results by byte: a token's boundary is at its first byte, its nats are spread over all."""
        starts = np.cumsum(self._num_bytes) - self._num_bytes
        nats = np.concatenate([[np.nan], self._next_nats])[:-1][self._num_bos :]
        stages = tuple(
            StageChunks(name, self._at(starts, prob, np.nan), self._at(starts, self._boundary[name], False))
            for name, prob in self._prob.items())
        token_starts = None if self._are_bytes else self._at(starts, np.ones(len(self.stream), bool), False)
        return ChunkedText(title, self.text, stages, nats=np.repeat(nats / self._num_bytes, self._num_bytes),
                           token_starts=token_starts)

    def _at(self, starts: np.ndarray, of_stream: np.ndarray, elsewhere: Any) -> np.ndarray:
        by_byte = np.full(len(self.text), elsewhere, of_stream.dtype)
        by_byte[starts] = of_stream[self._num_bos :]
        return by_byte
