"""Recurrences along an axis of time that is spread over devices.

Each shard says what it would leave behind of a state that enters it, and what it leaves behind of its own: one
matrix or vector, and one state. All shards are told all of these, and each works out the state that enters it,
from which it runs.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Summary(NamedTuple):
    """What the tokens of a shard do to a state that enters it: transition (state) + own."""

    transition: jax.Array  # [b, ...]
    own: jax.Array         # [b, ...], as a state


def states_around(
    axis_name: str, summary: Summary, apply: Callable[[jax.Array, jax.Array], jax.Array], initial_state: jax.Array,
    segment_ids: jax.Array | None, *, reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns the state that enters this shard [b, ...], and the one that leaves the last.

    Args:
      axis_name: of the mesh, inside `jax.shard_map`; time is sharded along it in order.
      apply: called with a transition and a state.
      initial_state: [b, ...] enters the first shard, of the first segment.
      segment_ids: [b, t] of the shard, in the order in which it runs; None means one segment in all shards.
      reverse: the last shard comes first.
    """
    if segment_ids is None:
        segment_ids = jnp.ones((initial_state.shape[0], 1), jnp.int32)
    edges = segment_ids[:, 0], segment_ids[:, -1], jnp.any(segment_ids != 0, axis=1)
    gathered = jax.lax.all_gather((summary, edges), axis_name)  # [shards, b, ...]
    index = jax.lax.axis_index(axis_name)
    if reverse:
        gathered = jax.tree.map(lambda x: jnp.flip(x, axis=0), gathered)
        index = jax.lax.axis_size(axis_name) - 1 - index
    summaries, (first_id, last_id, has_tokens) = gathered

    id_before = jnp.concatenate([jnp.zeros_like(last_id[:1]), last_id[:-1]])
    num_before = jnp.cumsum(has_tokens, axis=0) - has_tokens
    goes_on = (num_before == 0) | ((first_id != 0) & (first_id == id_before))

    def step(state, shard):
        summary, goes_on, has_tokens = shard
        entering = jnp.where(_over(goes_on | ~has_tokens, state), state, 0)
        return apply(summary.transition, entering) + summary.own, entering

    last, entering = jax.lax.scan(step, varying_like(initial_state, summary.own), (summaries, goes_on, has_tokens))
    return jax.lax.dynamic_index_in_dim(entering, index, keepdims=False), last


def _over(per_row: jax.Array, state: jax.Array) -> jax.Array:
    return per_row.reshape(-1, *(1,) * (state.ndim - 1))


def varying_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """x, for a loop inside `jax.shard_map` that makes of it what differs between devices as `like` does.

    The loop wants to be told so of its first value already. All it is told is a type: the choice is made for good.
    """
    return jnp.where(False, like[(0,) * like.ndim].astype(x.dtype), x)
