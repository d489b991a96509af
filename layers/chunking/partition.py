"""Dynamic chunking: a router cuts a sequence into chunks, an inner network sees one vector per chunk.

H-Net (arXiv 2507.07955), section 2.2, with the conventions of the released code where the two differ.
Everything has a static shape: a row of t tokens owns a fixed number of chunk slots, its chunks fill
the first of them in order, and slots beyond carry segment id 0, that is, they are padding.

  p    = router(x, segment_ids)                             where chunks begin  [b, t]
  plan = assign_chunks(p > 0.5, segment_ids, capacity)      who owns which slot
  z    = inner network on chunk(x, plan)                                        [b, c, d]
  y, _ = dechunk(z, p, plan); y * straight_through(...)     smoothing, upsampling [b, t, d]

Rows may share one buffer of slots instead (`pack_rows`): to everything here the buffer is then one long row,
in which the rows are segments.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Int, typed
from layers.arrays.segments import segment_ordinals


class ChunkPlan(NamedTuple):
    """Which chunk slot each token starts and reads, for one row length t and one capacity c."""

    starts_chunk: jax.Array  # [b, t] bool: boundaries that got a slot
    slot: jax.Array          # [b, t] int32: the slot a token reads; c where there is none
    token: jax.Array         # [b, c] int32: the token that starts the chunk in each slot; t if empty
    segment_ids: jax.Array   # [b, c] int32: the chunk's segment; 0 for an empty slot
    num_overflow: jax.Array  # [b] int32: boundaries past the capacity; their tokens join the chunk before


@typed
def assign_chunks(
    boundary_mask: Bool[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    capacity: int,
    *,
    num_before: Int[Array, "b"] | None = None,
    limit: int | None = None,
) -> ChunkPlan:
    """Gives the first `capacity` boundaries of each row a slot, in order.

    Which boundaries stay depends on earlier tokens alone, so training and decoding agree. A token whose own
    segment has no chunk yet (its first boundary overflowed) reads no slot, never another segment's.

    Args:
      num_before: chunks that each row began in earlier calls, where rows go on from those.
      limit: chunks that a row may have in all, those before included; None = no limit.
    Raises:
      ValueError: capacity is not in 1 .. t.
    """
    num_rows, length = boundary_mask.shape
    if not 1 <= capacity <= length:
        raise ValueError(f"capacity {capacity} must be between 1 and the {length} tokens of a row")
    boundary_mask = boundary_mask & (segment_ids != 0)
    rank = jnp.cumsum(boundary_mask, axis=1, dtype=jnp.int32) - 1
    room = jnp.full((num_rows, 1), capacity, jnp.int32)
    if num_before is not None and limit is not None:
        room = jnp.minimum(room, limit - num_before[:, None])
    starts_chunk = boundary_mask & (rank < room)

    row = jnp.arange(num_rows)[:, None]
    target = jnp.where(starts_chunk, rank, capacity)  # one past the end is dropped
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), boundary_mask.shape)
    token = jnp.full((num_rows, capacity), length, jnp.int32).at[row, target].set(index, mode="drop")
    chunk_ids = jnp.take_along_axis(segment_ids, token, axis=1, mode="fill", fill_value=0)

    last = jnp.minimum(rank, room - 1)
    own_id = jnp.take_along_axis(chunk_ids, jnp.maximum(last, 0), axis=1)
    may_read = (own_id == segment_ids) & (segment_ids != 0) & (last >= 0)
    num_overflow = jnp.sum(boundary_mask & ~starts_chunk, axis=1, dtype=jnp.int32)
    return ChunkPlan(starts_chunk, jnp.where(may_read, last, capacity), token, chunk_ids, num_overflow)


@typed
def pack_segments(segment_ids: Int[Array, "b t"], num_buffers: int) -> Int[Array, "n l"]:
    """Segment ids of `num_buffers` buffers, each of which holds equally many rows one after the other.

    Segments of different rows get different ids; see `pack_rows`.
    """
    row = jnp.arange(segment_ids.shape[0], dtype=jnp.int32)[:, None]
    unique = row * segment_ids.shape[1] + segment_ordinals(segment_ids)
    return jnp.where(segment_ids != 0, unique, 0).reshape(num_buffers, -1)
