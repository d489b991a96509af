"""Recurrences over rows of segments: which state enters where, and which one is the last."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.arrays.segments import segment_ordinals
from layers.recurrences.context_parallel import Summary, states_around

PADDING, REAL, FIRST = 0, 1, 2  # marks: the state passes over the token, enters it, or is dropped before it


class Shards(NamedTuple):
    """Time sharded over devices, and how a recurrence crosses the edges of shards.

    Attributes:
      axis_name: axis of the mesh along which time is sharded, in order, inside `jax.shard_map`.
      summarize: called with the prepared inputs of a shard.
      apply: applies the transition of a `Summary` to a state.
    """

    axis_name: str
    summarize: Callable[[Any], Summary]
    apply: Callable[[jax.Array, jax.Array], jax.Array]


def pair(inputs: Any, marks: jax.Array | None) -> tuple[Any, jax.Array | None]:
    return inputs, marks


def run_segments(
    run: Callable[..., tuple[jax.Array, jax.Array]], inputs: Any, initial_state: jax.Array,
    segment_ids: jax.Array | None, *, prepare: Callable[[Any, jax.Array | None], Any] = pair,
    has_state_per_segment: bool, reverse: bool, flip_inputs: bool = True, shards: Shards | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs a recurrence over rows of segments; returns the outputs [b, t, ...] and the last state.

    Args:
      run: called with prepared inputs and an initial state. Padding must be inert and read 0; the state must be
        dropped before a first token.
      inputs: a pytree of arrays [b, t, ...].
      initial_state: [b, ...] enters the first token; other segments begin with zeros, and the last state is that
        of the last segment. With `has_state_per_segment` [b, e, ...], one for each segment of a row, and so is the
        last state; a segment that a row lacks keeps its own. This costs e times the work.
      prepare: joins inputs and marks [b, t] of PADDING, REAL and FIRST, which are None where all are REAL.
      reverse: run from the last token to the first.
      flip_inputs: if True, reverse the inputs before calling `run`; otherwise `run` handles `reverse` itself.
      shards: how time is sharded over devices; None if it is not.
    """
    def flip(x: jax.Array) -> jax.Array:
        return jnp.flip(x, axis=1) if reverse else x

    def flip_for_run(x: jax.Array) -> jax.Array:
        return flip(x) if flip_inputs else x

    inputs = jax.tree.map(flip_for_run, inputs)
    if has_state_per_segment:
        if shards is not None:
            raise NotImplementedError("a state per segment, [b, e, ...], is not supported where time is sharded; "
                                      "give one per row")
        if segment_ids is None:
            segment_ids = jnp.ones(jax.tree.leaves(inputs)[0].shape[:2], jnp.int32)
        is_real, ordinals = segment_ids != 0, segment_ordinals(segment_ids)

        def run_one(number: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
            marks = flip_for_run(jnp.where(is_real & (ordinals == number), REAL, PADDING))
            return run(prepare(inputs, marks), state)

        numbers = jnp.arange(1, initial_state.shape[1] + 1)
        y, last = jax.vmap(run_one, in_axes=(0, 1), out_axes=(0, 1))(numbers, initial_state)
        return flip_for_run(jnp.sum(y, axis=0).astype(y.dtype)), last

    marks = None if segment_ids is None else flip_for_run(flip(_mark_tokens(flip(segment_ids))))
    prepared = prepare(inputs, marks)
    if shards is None:
        y, last = run(prepared, initial_state)
        return flip_for_run(y), last
    initial_state, last = states_around(
        shards.axis_name, shards.summarize(prepared), shards.apply, initial_state,
        None if segment_ids is None else flip(segment_ids), reverse=reverse)
    return flip_for_run(run(prepared, initial_state)[0]), last


def _mark_tokens(segment_ids: jax.Array) -> jax.Array:
    """Marks tokens in the order in which they are run; the first segment has no FIRST, as a state enters it."""
    ordinals = segment_ordinals(segment_ids)
    before = jnp.concatenate([jnp.ones_like(ordinals[:, :1]), ordinals[:, :-1]], axis=1)
    return jnp.where(ordinals > before, FIRST, jnp.where(segment_ids != 0, REAL, PADDING))
