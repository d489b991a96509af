"""What segments mean for a recurrence: which state enters where, and which one is the last."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.arrays.segments import segment_ordinals
from layers.recurrences.context_parallel import Summary, states_around

PADDING, REAL, FIRST = 0, 1, 2  # marks: the state passes over the token, enters it, or is dropped before it


class Shards(NamedTuple):
    """How a recurrence gets over the edges of shards.

    Attributes:
      axis_name: of the mesh, along which time is sharded, in order, inside `jax.shard_map`.
      summarize: called with tokens and marks, as `run` is.
      apply: what a `Summary`'s transition makes of a state.
    """

    axis_name: str
    summarize: Callable[..., Summary]
    apply: Callable[[jax.Array, jax.Array], jax.Array]


def over_segments(
    run: Callable[..., tuple[jax.Array, jax.Array]], tokens: Any, initial_state: jax.Array,
    segment_ids: jax.Array | None, *, has_one_each: bool, reverse: bool, turns: bool = True,
    shards: Shards | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs a recurrence over rows of segments; returns the outputs [b, t, ...] and the last state.

    Args:
      run: called with tokens, an initial state, and marks [b, t] of PADDING, REAL and FIRST, or None for REAL
        throughout. Padding is inert and reads 0; the state is dropped before a first token.
      tokens: a pytree of arrays [b, t, ...].
      initial_state: [b, ...] enters the first token; other segments begin with zeros, and the last state is that
        of the last segment. With `has_one_each` [b, n, ...], one for each segment of a row, and so is the last
        state; a segment that is not there keeps its own. This costs n times the work.
      reverse: run from the last token to the first.
      turns: give `run` what is reversed turned round; else `run` begins at the last token by itself.
      shards: time is sharded over devices, so.
    """
    def turned(x: jax.Array) -> jax.Array:
        return jnp.flip(x, axis=1) if reverse else x

    def for_run(x: jax.Array) -> jax.Array:
        return turned(x) if turns else x

    tokens = jax.tree.map(for_run, tokens)
    if has_one_each:
        if shards is not None:
            raise NotImplementedError("a state per segment, [b, n, ...], is not there for time that is sharded; "
                                      "give one per row")
        if segment_ids is None:
            segment_ids = jnp.ones(jax.tree.leaves(tokens)[0].shape[:2], jnp.int32)
        is_real, ordinals = segment_ids != 0, segment_ordinals(segment_ids)

        def of_one(number: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
            return run(tokens, state, for_run(jnp.where(is_real & (ordinals == number), REAL, PADDING)))

        numbers = jnp.arange(1, initial_state.shape[1] + 1)
        y, last = jax.vmap(of_one, in_axes=(0, 1), out_axes=(0, 1))(numbers, initial_state)
        return for_run(jnp.sum(y, axis=0).astype(y.dtype)), last

    marks = None if segment_ids is None else for_run(turned(_marks(turned(segment_ids))))
    if shards is None:
        y, last = run(tokens, initial_state, marks)
        return for_run(y), last
    initial_state, last = states_around(
        shards.axis_name, shards.summarize(tokens, marks), shards.apply, initial_state,
        None if segment_ids is None else turned(segment_ids), reverse=reverse)
    return for_run(run(tokens, initial_state, marks)[0]), last


def _marks(segment_ids: jax.Array) -> jax.Array:
    """Of tokens in the order in which they are run. The first segment does not begin: a state enters it."""
    ordinals = segment_ordinals(segment_ids)
    before = jnp.concatenate([jnp.ones_like(ordinals[:, :1]), ordinals[:, :-1]], axis=1)
    return jnp.where(ordinals > before, FIRST, jnp.where(segment_ids != 0, REAL, PADDING))
