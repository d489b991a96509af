"""Recurrences along an axis of time that is sharded over devices.

Each shard summarises its effect on a state that enters it, a transition (one matrix or vector) and a state of its
own. All shards gather all summaries; each works out the state that enters it, and runs from there.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Summary(NamedTuple):
    """Effect of a shard's tokens on a state that enters it: transition (state) + own."""

    transition: jax.Array  # [b, ...]
    own: jax.Array         # [b, ...], shaped as a state


def states_around(
    axis_name: str, summary: Summary, apply: Callable[[jax.Array, jax.Array], jax.Array], initial_state: jax.Array,
    segment_ids: jax.Array | None, *, reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns the state that enters this shard [b, ...], and the one that leaves the last.

    Args:
      axis_name: axis of the mesh, inside `jax.shard_map`, along which time is sharded in order.
      apply: called with a transition and a state.
      initial_state: [b, ...] enters the first segment of the first shard.
      segment_ids: [b, t] of this shard, in the order in which it runs; None means one segment in all shards.
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
    continues = (num_before == 0) | ((first_id != 0) & (first_id == id_before))

    def step(state, shard):
        summary, continues, has_tokens = shard
        entering = jnp.where(_broadcast_rows(continues | ~has_tokens, state), state, 0)
        return apply(summary.transition, entering) + summary.own, entering

    start = varying_like(initial_state, summary.own)
    last, entering = jax.lax.scan(step, start, (summaries, continues, has_tokens))
    return jax.lax.dynamic_index_in_dim(entering, index, keepdims=False), last


def _broadcast_rows(per_row: jax.Array, state: jax.Array) -> jax.Array:
    return per_row.reshape(-1, *(1,) * (state.ndim - 1))


def varying_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Casts x to vary over the same mesh axes as `like`, as a scan requires of its carry inside `jax.shard_map`.

    Only the type changes: the condition is False, so x is what is returned.
    """
    return jnp.where(False, like[(0,) * like.ndim].astype(x.dtype), x)
