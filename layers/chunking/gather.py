"""Chunks out of tokens, and tokens out of chunks."""
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, Shaped, typed
from layers.arrays.segments import last_real, segment_starts
from layers.chunking.partition import ChunkPlan
from layers.chunking.smoothing import SmoothingImplementation, smooth

Pooling = Literal["mean", "max"]


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
def pack_rows(x: Shaped[Array, "b t *d"], num_buffers: int) -> Shaped[Array, "n l *d"]:
    """Puts rows one after the other into `num_buffers` buffers, to share slots; `reshape` is the way back.

    The chunks of a whole buffer vary less, relative to their number, than those of its worst row.
    """
    return x.reshape(num_buffers, -1, *x.shape[2:])
