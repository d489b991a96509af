"""Arithmetic on segment ids: where segments start, and positions inside them.

Ids are as `array_types` defines them: 0 is padding, non-zero ids are contiguous and unique in a row. A row that is
read in several calls continues a segment if its first id is the last of the call before; any other id begins anew.
"""
import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Int, Shaped, typed


@typed
def segment_starts(segment_ids: Int[Array, "b t"], carried: Int[Array, "b"] | None = None) -> Bool[Array, "b t"]:
    """Marks the first token of every segment with True, never padding.

    Args:
      carried: from `carried_segment`: segments that began in an earlier call, and do not start here.
    """
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    starts = (segment_ids != 0) & (segment_ids != previous)
    return starts if carried is None else starts & (segment_ids != carried[:, None])


@typed
def segment_positions(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Counts 0, 1, 2, ... from the start of each segment."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(segment_starts(segment_ids), index, 0), axis=1)
    return index - start


@typed
def last_real(x: Shaped[Array, "b t *d"], segment_ids: Int[Array, "b t"]) -> Shaped[Array, "b *d"]:
    """Takes the entry of `x` at the last token that is not padding; the first entry of a row of padding."""
    index = jnp.max(jnp.where(segment_ids != 0, jnp.arange(segment_ids.shape[1]), 0), axis=1)
    return x[jnp.arange(x.shape[0]), index]


@typed
def carried_segment(segment_ids: Int[Array, "b t"], last_id: Int[Array, "b"]) -> Int[Array, "b"]:
    """Returns the id of the segment that each row continues; 0 where it begins another, or holds padding alone.

    Args:
      last_id: the segment that earlier calls ended in, from `last_segment`; 0 before the first.
    """
    first = jnp.argmax(segment_ids != 0, axis=1)
    first_id = segment_ids[jnp.arange(segment_ids.shape[0]), first]
    return jnp.where(first_id == last_id, first_id, 0)


@typed
def last_segment(segment_ids: Int[Array, "b t"], last_id: Int[Array, "b"]) -> Int[Array, "b"]:
    """Returns the id of the segment that each row ends in; a row of padding stays in `last_id`."""
    return jnp.where(jnp.any(segment_ids != 0, axis=1), last_real(segment_ids, segment_ids), last_id)


@typed
def count_in_segment(
    is_counted: Bool[Array, "b t"], segment_ids: Int[Array, "b t"], before: Int[Array, "b"],
    last_id: Int[Array, "b"],
) -> tuple[Int[Array, "b t"], Int[Array, "b"]]:
    """Counts the tokens marked so far in the segment of each token, and in the segment that each row ends in.

    Args:
      before: the count that earlier calls ended with, in the segment `last_id`.
    """
    total = jnp.cumsum(is_counted, axis=1, dtype=jnp.int32)
    starts = segment_starts(segment_ids)
    ahead = jax.lax.cummax(jnp.where(starts, total - is_counted, 0), axis=1)
    carried = carried_segment(segment_ids, last_id)[:, None]
    is_carried = (segment_ids == carried) & (carried != 0)
    count = total - ahead + jnp.where(is_carried, before[:, None], 0)
    return count, jnp.where(jnp.any(segment_ids != 0, axis=1), last_real(count, segment_ids), before)


@typed
def segment_ordinals(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Numbers the segments of a row 1, 2, 3, ...; padding takes the number of the segment before it.

    The numbers never decrease, and padding ahead of everything is 1, so a state carried into the row
    (ordinal 1) reaches exactly the first segment.
    """
    return jnp.maximum(jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32), 1)
