"""Where a model cuts a text, stage by stage, aligned with its bytes."""
from typing import Any

import jax
import numpy as np

from experiments.chunk_html import ChunkedText, StageChunks
from experiments.config import RunConfig
from experiments.data import BOS
from experiments.run import evaluation_config
from hnet import HNetLM, HNetOutput


def chunk_texts(
    config: RunConfig, params: Any, texts: list[tuple[str, bytes]]
) -> tuple[ChunkedText, ...]:
    """Runs the model over (title, text) pairs and reads off every stage's boundaries, at full capacity.

    The model sees windows as long as in training. Neighbouring windows overlap by half, and
    a byte is read from the one where it has at least half a window before it: a window's own first byte
    always starts a chunk, which says nothing about the text.
    """
    model = HNetLM(evaluation_config(config.model))
    run = jax.jit(lambda tokens, segment_ids: model.apply({"params": params}, tokens, segment_ids))
    return tuple(_chunk_text(run, title, text, config) for title, text in texts)


def _chunk_text(run: Any, title: str, text: bytes, config: RunConfig) -> ChunkedText:
    size = config.data.sequence_length
    half = size // 2
    stream = np.frombuffer(bytes([BOS]) + text, np.uint8).astype(np.int32)
    probability = {f"stage{index}": np.full(len(stream), np.nan) for index in range(len(config.model.stages) - 1)}
    is_boundary = {name: np.zeros(len(stream), bool) for name in probability}
    for start in range(0, max(len(stream) - half, 1), half):
        piece = stream[start : start + size]
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(piece)] = piece
        output = run(tokens, (np.arange(size)[None] < len(piece)).astype(np.int32))
        skip = half if start else 0
        for name, (position, p, boundary) in byte_boundaries(output, row=0).items():
            read = position >= skip
            probability[name][start + position[read]] = p[read]
            is_boundary[name][start + position[read]] = boundary[read]
    stages = tuple(StageChunks(name, probability[name][1:], is_boundary[name][1:]) for name in probability)
    return ChunkedText(title, text, stages)


def byte_boundaries(output: HNetOutput, row: int) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Maps each stage to (byte position, boundary_prob, boundary_mask) of the tokens it saw in this row.

    Positions count tokens of stage 0. The run must have had full capacity, or slots and boundaries differ.
    """
    position = np.flatnonzero(np.asarray(output.stages["stage0"].mask[row])) if output.stages else None
    found = {}
    for name, stage in output.stages.items():
        mask = np.asarray(stage.mask[row])
        boundary = np.asarray(stage.boundary_mask[row])[mask]
        found[name] = position, np.asarray(stage.boundary_prob[row])[mask], boundary
        position = position[boundary]
    return found
