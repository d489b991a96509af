"""Trains one mixer in one setting: compiled once, and run for every learning rate and seed."""
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.config import OptimizerConfig
from experiments.tasks.config import TaskConfig
from experiments.tasks.examples import Examples, Source, answer_nats, count_right, sample_batch, split_key
from experiments.tasks.model import TaskModel
from experiments.tasks.settings import Setting
from experiments.training.optimizer import make_optimizer


class TaskState(NamedTuple):
    step: jax.Array  # int32: steps taken, which is also the position in the data
    params: Any
    opt_state: Any


class Measured(NamedTuple):
    """Means over the steps of a call, each measured on sequences that training had not seen."""

    step: int          # the last one
    loss_nats: float
    accuracy: float


class Trainer:
    """The compiled programs of a mixer and a setting.

    A call trains for `steps_per_call` steps on sequences that it draws itself: nothing comes from the host. There
    is a program per length of sequences, whatever the number of sources and columns of that length.
    """

    def __init__(self, config: TaskConfig, mixer: str, setting: Setting) -> None:
        self.config, self.setting = config, setting
        self._sources = setting.sources
        self._tested = tuple(column.source for column in setting.columns)
        self._model = TaskModel(
            config.layout_of(mixer), config.stack, setting.input_size, setting.num_classes, config.conv_taps,
            jnp.dtype(config.dtype))
        shapes = jax.eval_shape(self._init_params, 0)
        self.num_params = sum(shape.size for shape in jax.tree.leaves(shapes))
        self._optimizer = make_optimizer(_optimizer_config(config), config.num_steps, shapes)
        self._init = jax.jit(self._init_state)
        self._train = jax.jit(self._train_call, static_argnames="sources", donate_argnums=0)
        self._count = jax.jit(self._count_right, static_argnames="sources")

    def train(self, seed: int, learning_rate: float) -> Iterator[tuple[TaskState, Measured]]:
        """Yields the state and what was measured after every call; stops early where the loss is not finite."""
        state, calls = self._init(seed), _sources_of_calls(self.setting, self.config.steps_per_call)
        for sources, chosen in itertools.islice(calls, self.config.num_steps // self.config.steps_per_call):
            state, losses, right = self._train(state, seed, learning_rate, chosen, sources=sources)
            measured = Measured(int(state.step), float(jnp.mean(losses)), float(right))
            yield state, measured
            if not math.isfinite(measured.loss_nats):
                return

    def accuracies(self, state: TaskState, seed: int, split: str) -> dict[str, float]:
        """The share of right answers in each column, on the "validation" or the "test" split of a seed."""
        shares = {}
        for index, column in enumerate(self.setting.columns):
            sources, chosen = _of_same_length(self._tested, index)
            key = split_key(seed, split, index)
            right, asked = self._count(state.params, key, chosen, sources=sources)
            shares[column.name] = float(right / asked)
        return shares

    def _init_state(self, seed: jax.Array) -> TaskState:
        params = self._init_params(seed)
        return TaskState(jnp.zeros((), jnp.int32), params, self._optimizer.init(params))

    def _init_params(self, seed: jax.Array) -> Any:
        example = sample_batch(self._sources[:1], 0, split_key(0, "train"), 0, batch_size=1)
        key = split_key(seed, "init")
        return nn.unbox(self._model.init(key, example.inputs, example.segment_ids, example.positions))["params"]

    def _train_call(
        self, state: TaskState, seed: jax.Array, learning_rate: jax.Array, chosen_of_steps: jax.Array, *,
        sources: tuple[Source, ...],
    ) -> tuple[TaskState, jax.Array, jax.Array]:
        key = split_key(seed, "train")

        def step(state, chosen):
            batch = sample_batch(sources, chosen, key, state.step, self.config.batch_size)
            (loss, logits), grads = jax.value_and_grad(self._loss, has_aux=True)(state.params, batch)
            updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
            # The schedule peaks at 1: with the rate as an argument, one program serves all of them.
            params = optax.apply_updates(state.params, jax.tree.map(lambda u: learning_rate * u, updates))
            return TaskState(state.step + 1, params, opt_state), (loss, *count_right(logits, batch))

        state, (losses, right, asked) = jax.lax.scan(step, state, chosen_of_steps)
        return state, losses, jnp.sum(right) / jnp.sum(asked)

    def _count_right(
        self, params: Any, key: jax.Array, chosen: jax.Array, *, sources: tuple[Source, ...]
    ) -> tuple[jax.Array, jax.Array]:
        def one_batch(_, index):
            batch = sample_batch(sources, chosen, key, index, self.config.test_batch_size)
            return None, count_right(self._apply(params, batch), batch)

        num_batches = math.ceil(self.config.test_sequences / self.config.test_batch_size)
        _, counts = jax.lax.scan(one_batch, None, jnp.arange(num_batches))
        return jax.tree.map(jnp.sum, counts)

    def _loss(self, params: Any, batch: Examples) -> tuple[jax.Array, jax.Array]:
        logits = self._apply(params, batch)
        return answer_nats(logits, batch), logits

    def _apply(self, params: Any, batch: Examples) -> jax.Array:
        return self._model.apply({"params": params}, batch.inputs, batch.segment_ids, batch.positions)


def _sources_of_calls(setting: Setting, num_steps: int) -> Iterator[tuple[tuple[Source, ...], np.ndarray]]:
    """For each call without end: sources of one length, and the number among them of each step's source."""
    by_length: dict[int, list[int]] = {}
    for index, source in enumerate(setting.sources):
        by_length.setdefault(source.length, []).append(index)
    shares = [[setting.shares[index] for index in indices] for indices in by_length.values()]
    members = [tuple(setting.sources[index] for index in indices) for indices in by_length.values()]
    turns = [in_turn(each) for each in shares]
    for group in in_turn([sum(each) for each in shares]):
        yield members[group], np.array(list(itertools.islice(turns[group], num_steps)), np.int32)


def in_turn(shares: Sequence[float]) -> Iterator[int]:
    """Yields without end the index whose count lags most behind its share: 0 1 0 0 1 0 0 1 0 ... for (2, 1)."""
    counts = [0] * len(shares)
    while True:
        chosen = min(range(len(shares)), key=lambda index: (counts[index] + 0.5) / shares[index])
        counts[chosen] += 1
        yield chosen


def _of_same_length(sources: tuple[Source, ...], chosen: int) -> tuple[tuple[Source, ...], int]:
    """The sources as long as the chosen one, and its number among them."""
    length = sources[chosen].length
    same = [index for index, source in enumerate(sources) if source.length == length]
    return tuple(sources[index] for index in same), same.index(chosen)


def _optimizer_config(config: TaskConfig) -> OptimizerConfig:
    """Returns the optimizer of a task, with a schedule that peaks at 1."""
    return OptimizerConfig(
        peak_lr=1.0, schedule=config.schedule, warmup_steps=0, warmup_fraction=config.warmup_fraction,
        final_lr_fraction=config.final_lr_fraction, weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm)


def symbols_per_second(source: Source, batch_size: int, *, repeats: int = 5) -> float:
    """Measures how fast sequences are made, by the fastest of some calls; steps of a gap are not symbols."""
    key = split_key(0, "train")
    draw = jax.jit(partial(sample_batch, (source,), 0, key, batch_size=batch_size))
    seconds = []
    for index in range(repeats + 1):
        start = time.perf_counter()
        batch = jax.block_until_ready(draw(index))
        seconds.append(time.perf_counter() - start)
    num_symbols = batch.inputs.size if batch.windows is None else jnp.sum(jnp.max(batch.windows, axis=1) + 1)
    return float(num_symbols) / min(seconds[1:])
