"""Training steps, one after another."""
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from experiments.data import BatchSource, prefetch
from experiments.training.losses import Batch, Metrics
from experiments.training.step import Program, TrainState


def steps(
    program: Program, state: TrainState, batches: BatchSource, place: Callable[[Any], Batch]
) -> Iterator[tuple[int, TrainState, Metrics]]:
    """Trains from `state` on without end, and yields each step's number, state and metrics.

    `place` puts a batch on the devices. Nothing waits for the device: the metrics may still be on their
    way. A state is donated to the step after it.
    """
    start = int(state.step)
    with contextlib.closing(prefetch(batches, start)) as ahead:
        for step, batch in enumerate(ahead, start + 1):
            state, metrics = program.step(state, place(batch))
            yield step, state, metrics
