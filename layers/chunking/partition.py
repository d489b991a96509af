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
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Int, Shaped, typed
from layers.arrays.segments import last_real, segment_ordinals, segment_starts
from layers.chunking.smoothing import SmoothingImplementation, smooth

Pooling = Literal["mean", "max"]


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
def chunk(x: Shaped[Array, "b t *d"], plan: ChunkPlan) -> Shaped[Array, "b c *d"]:
    """Takes the entry of each chunk's first token (section 2.2.1, downsampler); empty slots are 0."""
    index = plan.token.reshape(plan.token.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


class PoolState(NamedTuple):
    """The tokens, so far, of the chunk that each row is in."""

    total: jax.Array  # [b, d] float32: their sum, or their maximum
    count: jax.Array  # [b] int32

    @classmethod
    def empty(cls, batch: int, width: int) -> "PoolState":
        return cls(jnp.zeros((batch, width), jnp.float32), jnp.zeros(batch, jnp.int32))


@typed
def chunk_pooled(
    x: Float[Array, "b t d"],
    plan: ChunkPlan,
    segment_ids: Int[Array, "b t"],
    *,
    pooling: Pooling,
    state: PoolState | None = None,
) -> tuple[Float[Array, "b c d"], PoolState]:
    """Fills each slot with the mean or maximum over the tokens of the chunk *before*, in the same segment.

    Pooled over its own tokens, a chunk would tell the earlier ones of them about the later. So what a token
    reads covers the chunks that were complete when its own began, as in MegaByte and BLT; the first
    slot of a segment is 0. Sums are float32; the result has the dtype of `x`.

    Args:
      state: where rows go on from earlier tokens; each row is then one segment, which those began.
    Returns:
      The slots, and the tokens of the chunk that each row ends in.
    """
    num_rows, num_slots = plan.token.shape
    width = x.shape[-1]
    begun = jnp.cumsum(plan.starts_chunk, axis=1, dtype=jnp.int32)  # 0: the chunk that the row came in with
    is_inside = (plan.slot == begun - 1) | ((begun == 0) & (segment_ids != 0) & (state is not None))
    pool = jnp.where(is_inside, begun, num_slots + 1)  # one past the end is dropped
    row = jnp.arange(num_rows)[:, None]

    before = state or PoolState.empty(num_rows, width)
    exact = x.astype(jnp.float32)
    count = jnp.zeros((num_rows, num_slots + 1), jnp.int32).at[:, 0].set(before.count)
    count = count.at[row, pool].add(1, mode="drop")
    if pooling == "mean":
        total = jnp.zeros((num_rows, num_slots + 1, width), jnp.float32).at[:, 0].set(before.total)
        total = total.at[row, pool].add(exact, mode="drop")
        pooled = total / jnp.maximum(count, 1)[:, :, None]
    else:
        nothing = jnp.finfo(jnp.float32).min
        first = jnp.where(before.count[:, None] > 0, before.total, nothing)
        total = jnp.full((num_rows, num_slots + 1, width), nothing).at[:, 0].set(first)
        total = total.at[row, pool].max(exact, mode="drop")
        pooled = total = jnp.where(count[:, :, None] > 0, total, 0)

    owner = jnp.pad(plan.segment_ids[:, :-1], ((0, 0), (1, 0)))  # [b, c]: segment of the pool before each slot
    owner = owner.at[:, 0].set(plan.segment_ids[:, 0] if state is not None else 0)
    belongs = (owner == plan.segment_ids) & (plan.segment_ids != 0)
    last = begun[:, -1]
    after = PoolState(total[jnp.arange(num_rows), last], count[jnp.arange(num_rows), last])
    return jnp.where(belongs[:, :, None], pooled[:, :-1], 0).astype(x.dtype), after


@typed
def dechunk(
    z: Float[Array, "b c d"],
    boundary_prob: Float[Array, "b t"],
    plan: ChunkPlan,
    *,
    smoothing: bool = True,
    initial_value: Float[Array, "b d"] | None = None,
    round_to_bfloat16: bool = False,
    implementation: SmoothingImplementation = "auto",
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
    """Smooths the chunks by their confidence and hands each token the value of its chunk, in float32.

    Smoothing (eq. 5): s_c = p_c z_c + (1 - p_c) s_{c-1}, with p clamped to [1e-4, 1 - 1e-4] and s reset to 0 at
    each segment. Upsampling (eq. 8): token t receives s of the chunk it is in; 0 if it is in none.

    Args:
      smoothing: False leaves s_c = z_c.
      initial_value: s of the chunk that each row begins in; each row is then one segment, which that chunk
        belongs to. None: rows begin in no chunk.
      round_to_bfloat16: see `smooth`.
    Returns:
      The tokens' values, and s of the chunk that each row ends in.
    """
    is_carried = initial_value is not None
    initial_value = jnp.zeros_like(z[:, 0], jnp.float32) if initial_value is None else initial_value
    smoothed = z.astype(jnp.float32)
    if smoothing:
        p = chunk(boundary_prob.astype(jnp.float32), plan)
        restarts = jnp.zeros_like(plan.segment_ids, bool) if is_carried else segment_starts(plan.segment_ids)
        smoothed = smooth(z, p, restarts, initial_value=initial_value, round_to_bfloat16=round_to_bfloat16,
                          implementation=implementation)
    # Slots past the last chunk are empty; the value that the row ends in is that of its last real one.
    is_chunk = (plan.segment_ids != 0)[:, :, None]
    last = jnp.where(is_chunk[:, 0], last_real(smoothed, plan.segment_ids), initial_value)
    upsampled = jnp.take_along_axis(smoothed, plan.slot[:, :, None], axis=1, mode="fill", fill_value=0)
    return jnp.where((plan.slot < z.shape[1])[:, :, None], upsampled, initial_value[:, None]), last


@typed
def straight_through(p: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Exactly 1 in the forward pass, with the gradient of `p` (eq. 7)."""
    return 1 + (p - jax.lax.stop_gradient(p))


@typed
def pack_segments(segment_ids: Int[Array, "b t"], num_buffers: int) -> Int[Array, "n l"]:
    """Segment ids of `num_buffers` buffers, each of which holds equally many rows one after the other.

    Segments of different rows get different ids; see `pack_rows`.
    """
    row = jnp.arange(segment_ids.shape[0], dtype=jnp.int32)[:, None]
    unique = row * segment_ids.shape[1] + segment_ordinals(segment_ids)
    return jnp.where(segment_ids != 0, unique, 0).reshape(num_buffers, -1)


@typed
def pack_rows(x: Shaped[Array, "b t *d"], num_buffers: int) -> Shaped[Array, "n l *d"]:
    """Puts rows one after the other into `num_buffers` buffers, to share slots; `reshape` is the way back.

    The chunks of a whole buffer vary less, relative to their number, than those of its worst row.
    """
    return x.reshape(num_buffers, -1, *x.shape[2:])
