"""The states of a stack's layers: made, advanced, and compressed, all layers of a run at once.

  state  = empty_state(layout, config, batch, max_length, dtype)
  output = stack(x, segment_ids, state)
  state  = apply_updates(layout, config, dtype, state, output.update)

A layer's update may be less than its state, as new keys are less than a cache. Only the update passes through the
scan over layers, which would otherwise copy every cache at every step.
"""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hnet.layout import MIXERS, mixer_of, parse_layout
from hnet.stack_config import StackConfig
from layers import Mixer


class StackState(NamedTuple):
    """States of all layers after the tokens read so far, or their updates."""

    segment: jax.Array      # [b] int32: the segment that each row is in; 0 before the first token
    runs: tuple[Any, ...]   # for every run its mixer's state or update, stacked over the layers of the run


def empty_state(layout: str, config: StackConfig, batch: int, max_length: int, dtype: jnp.dtype) -> StackState:
    """Makes the state before the first token; attention holds up to `max_length` tokens of a segment."""
    def stacked(mixer: Mixer, count: int) -> Any:
        state = mixer.empty_state(batch, config.width, max_length)
        return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], count, axis=0), state)

    runs = tuple(stacked(_mixer(layer, config, dtype), count) for layer, count in parse_layout(layout))
    return StackState(jnp.zeros(batch, jnp.int32), runs)


def apply_updates(
    layout: str, config: StackConfig, dtype: jnp.dtype, state: StackState, update: StackState
) -> StackState:
    """Returns the state after the tokens that made `update`."""
    runs = _for_runs(layout, config, dtype, lambda mixer, *args: jax.vmap(mixer.apply_update)(*args),
                     state.runs, update.runs)
    return StackState(update.segment, runs)


def empty_updates(layout: str, config: StackConfig, dtype: jnp.dtype, state: StackState) -> StackState:
    """Makes the update of a call in which every row is one padding token."""
    runs = _for_runs(layout, config, dtype, lambda mixer, run: jax.vmap(mixer.empty_update)(run), state.runs)
    return StackState(state.segment, runs)


def keep_scores(layout: str, config: StackConfig, dtype: jnp.dtype, state: StackState) -> tuple[Any, ...]:
    """Rates the tokens that each layer holds: for every run [layers, b, p, s], or None if it holds no tokens.

    Scores of several layers and heads, compared, make budgets that cross them: see `compress`.
    """
    return _for_runs(layout, config, dtype, lambda mixer, run: jax.vmap(mixer.keep_scores)(run), state.runs)


def compress(
    layout: str, config: StackConfig, dtype: jnp.dtype, state: StackState, budgets: Sequence[Any]
) -> StackState:
    """Frees tokens in all layers in one call, each layer down to a budget of its own.

    Args:
      budgets: for every run None, to leave it as it is, or how many tokens stay: a number, or an array of one per
        layer, [layers], or [layers, b, p] for rows and key heads of their own.
    """
    def one_run(mixer: Mixer, run: Any, budget: Any) -> Any:
        if budget is None:
            return run
        count = jax.tree.leaves(run)[0].shape[0]
        budget = jnp.asarray(budget)
        budget = jnp.broadcast_to(budget, (count,)) if budget.ndim == 0 else budget
        return jax.vmap(mixer.compress)(run, budget)

    return state._replace(runs=_for_runs(layout, config, dtype, one_run, state.runs, tuple(budgets)))


def _for_runs(
    layout: str, config: StackConfig, dtype: jnp.dtype, function: Callable[..., Any], *per_run: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Calls `function` with the mixer of each run and the run's entry of every argument."""
    mixers = [_mixer(layer, config, dtype) for layer, _ in parse_layout(layout)]
    return tuple(function(mixer, *entries) for mixer, *entries in zip(mixers, *per_run, strict=True))


def _mixer(layer: str, config: StackConfig, dtype: jnp.dtype) -> Mixer:
    """Makes the mixer of a layer, to call its methods that need no parameters."""
    # Without a parent: inside a model that is being applied it would become a part of that.
    return MIXERS[mixer_of(layer)].make(config, out_init_std=0.0, dtype=dtype, name="mixer", parent=None)
