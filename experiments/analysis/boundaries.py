"""Boundaries and prediction losses of a model on a text, aligned with the bytes of the text."""
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from experiments.analysis.chunked_text import ChunkedText, StageChunks
from experiments.config import RunConfig
from experiments.data import BOS
from hnet import HNetLM, StageOutput

ROWS = 8  # windows per call; fewer are padded to this, so that the model compiles once


def chunk_texts(
    config: RunConfig, params: Any, texts: list[tuple[str, bytes]]
) -> tuple[ChunkedText, ...]:
    """Runs the model over (title, text) pairs and returns every stage's boundaries and every byte's nats.

    Stages run at full capacity on windows as long as in training. Neighbouring windows overlap by half, and a
    byte's results come from the window that has at least half its length before it: the first byte of a window
    always starts a chunk, which says nothing about the text. Every text begins with a BOS of its own.
    """
    model, size = HNetLM(config.model.at_full_capacity()), config.data.sequence_length
    read = jax.jit(lambda *arguments: _read_windows(model, *arguments))
    readings = [_Reading(text, num_stages=len(config.model.stages) - 1) for _, text in texts]
    windows = [(reading, start) for reading in readings for start in reading.window_starts(size)]
    for first in range(0, len(windows), ROWS):
        batch = windows[first : first + ROWS]
        tokens = np.zeros((ROWS, size + 1), np.int32)
        is_token = np.zeros((ROWS, size), np.int32)
        for row, (reading, start) in enumerate(batch):
            piece = reading.stream[start : start + size + 1]
            tokens[row, : len(piece)] = piece
            is_token[row, : len(piece)] = 1
        nats, stages = jax.device_get(read(params, tokens, is_token))
        for row, (reading, start) in enumerate(batch):
            reading.add(start, size, nats[row], byte_boundaries(stages, row))
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
    """Results so far for one text, at each position of its stream: BOS, then its bytes."""

    def __init__(self, text: bytes, num_stages: int) -> None:
        self.text = text
        self.stream = np.frombuffer(bytes([BOS]) + text, np.uint8).astype(np.int32)
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
        stages = tuple(StageChunks(name, self._prob[name][1:], self._boundary[name][1:]) for name in self._prob)
        return ChunkedText(title, self.text, stages, nats=self._next_nats[:-1])
