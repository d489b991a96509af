"""Dynamic chunking: a router cuts a sequence into chunks, an inner network sees one vector per chunk.

H-Net (arXiv 2507.07955), section 2.2, with the conventions of the released code where the two differ.
Everything has a static shape: a row of t tokens owns a fixed number of chunk slots, its chunks fill
the first of them in order, and slots beyond carry segment id 0, that is, they are padding.

  p    = boundary_probability(q, k, segment_ids)            routing             [b, t]
  plan = assign_chunks(p > 0.5, segment_ids, capacity)      who owns which slot
  z    = inner network on chunk(x, plan)                                        [b, c, d]
  y, _ = dechunk(z, p, plan); y * straight_through(...)     smoothing, upsampling [b, t, d]
"""
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Int, Scalar, typed
from layers.segments import last_real, segment_starts

# The release clamps the smoothing weight to [1e-4, 1 - 1e-4], so even a first chunk counts 0.9999.
MIN_SMOOTHING = 1e-4

SmoothingImplementation = Literal["auto", "reference", "associative"]


class RouterState(NamedTuple):
    """What a router remembers of the tokens read so far."""

    last_query: jax.Array  # [b, d] float32: the query of the last real token
    has_seen: jax.Array    # [b] bool: whether there was one

    @classmethod
    def empty(cls, batch: int, width: int) -> "RouterState":
        return cls(jnp.zeros((batch, width), jnp.float32), jnp.zeros(batch, bool))


@typed
def boundary_probability(
    query: Float[Array, "b t d"],
    key: Float[Array, "b t d"],
    segment_ids: Int[Array, "b t"],
    state: RouterState | None = None,
) -> Float[Array, "b t"]:
    """Returns p_t = (1 - cos(query_{t-1}, key_t)) / 2 in float32: neighbours that differ start a chunk.

    Eq. 4, with the query on the earlier token as in the release (the paper writes the opposite). p is 1 at the
    first token of every segment, without a gradient, and 0 at padding.

    Args:
      state: where rows go on from earlier tokens; each row is then one segment, which those began.
    """
    starts = segment_starts(segment_ids)
    previous = jnp.pad(query[:, :-1], ((0, 0), (1, 0), (0, 0)))
    if state is not None:
        previous = jnp.where(starts[:, :, None], state.last_query[:, None].astype(query.dtype), previous)
        starts = starts & ~state.has_seen[:, None]
    p = (1 - jnp.einsum("btd,btd->bt", _normalise(previous), _normalise(key))) / 2
    # Not jnp.clip, which halves the gradient at a tie; and a cosine of exactly 1 is common (a repeated byte).
    p = jnp.where(p < 0, 0.0, jnp.where(p > 1, 1.0, p))
    return jnp.where(segment_ids == 0, 0.0, jnp.where(starts, 1.0, p))


def _normalise(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) in float32, with a gradient of 0 rather than NaN where x is 0."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    is_zero = square == 0
    norm = jnp.sqrt(jnp.where(is_zero, 1.0, square))
    return jnp.where(is_zero, 0.0, x / jnp.maximum(norm, 1e-12))


class ChunkPlan(NamedTuple):
    """Which chunk slot each token starts and reads, for one row length t and one capacity c."""

    starts_chunk: jax.Array  # [b, t] bool: boundaries that got a slot
    slot: jax.Array          # [b, t] int32: the slot a token reads; c where there is none
    token: jax.Array         # [b, c] int32: the token that starts the chunk in each slot; t if empty
    segment_ids: jax.Array   # [b, c] int32: the chunk's segment; 0 for an empty slot
    num_overflow: jax.Array  # [b] int32: boundaries past the capacity; their tokens join the chunk before


@typed
def assign_chunks(
    boundary_mask: Bool[Array, "b t"], segment_ids: Int[Array, "b t"], capacity: int
) -> ChunkPlan:
    """Gives the first `capacity` boundaries of each row a slot, in order.

    Which boundaries stay depends on earlier tokens alone, so training and decoding agree. A token whose own
    segment has no chunk yet (its first boundary overflowed) reads no slot, never another segment's.

    Raises:
      ValueError: capacity is not in 1 .. t.
    """
    num_rows, length = boundary_mask.shape
    if not 1 <= capacity <= length:
        raise ValueError(f"capacity {capacity} must be between 1 and the {length} tokens of a row")
    boundary_mask = boundary_mask & (segment_ids != 0)
    rank = jnp.cumsum(boundary_mask, axis=1, dtype=jnp.int32) - 1
    starts_chunk = boundary_mask & (rank < capacity)

    row = jnp.arange(num_rows)[:, None]
    target = jnp.where(starts_chunk, rank, capacity)  # one past the end is dropped
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), boundary_mask.shape)
    token = jnp.full((num_rows, capacity), length, jnp.int32).at[row, target].set(index, mode="drop")
    chunk_ids = jnp.take_along_axis(segment_ids, token, axis=1, mode="fill", fill_value=0)

    slot = jnp.clip(rank, 0, capacity - 1)
    may_read = (jnp.take_along_axis(chunk_ids, slot, axis=1) == segment_ids) & (segment_ids != 0) & (rank >= 0)
    num_overflow = jnp.maximum(jnp.sum(boundary_mask, axis=1, dtype=jnp.int32) - capacity, 0)
    return ChunkPlan(starts_chunk, jnp.where(may_read, slot, capacity), token, chunk_ids, num_overflow)


@typed
def chunk(x: Float[Array, "b t d"], plan: ChunkPlan) -> Float[Array, "b c d"]:
    """Takes the vector of each chunk's first token (section 2.2.1, downsampler); empty slots are 0."""
    return jnp.take_along_axis(x, plan.token[:, :, None], axis=1, mode="fill", fill_value=0)


@typed
def dechunk(
    z: Float[Array, "b c d"],
    boundary_prob: Float[Array, "b t"],
    plan: ChunkPlan,
    *,
    initial_value: Float[Array, "b d"] | None = None,
    implementation: SmoothingImplementation = "auto",
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
    """Smooths the chunks by their confidence and hands each token the value of its chunk, in float32.

    Smoothing (eq. 5): s_c = p_c z_c + (1 - p_c) s_{c-1}, with p clamped to [1e-4, 1 - 1e-4] and s reset to 0 at
    each segment. Upsampling (eq. 8): token t receives s of the chunk it is in; 0 if it is in none.

    Args:
      initial_value: s of the chunk that each row begins in; each row is then one segment, which that chunk
        belongs to. None: rows begin in no chunk.
    Returns:
      The tokens' values, and s of the chunk that each row ends in.
    """
    p = jnp.take_along_axis(boundary_prob.astype(jnp.float32), plan.token, axis=1, mode="fill", fill_value=0)
    restarts = segment_starts(plan.segment_ids)
    if initial_value is None:
        initial_value = jnp.zeros_like(z[:, 0], jnp.float32)
    else:
        restarts = jnp.zeros_like(restarts)
    smoothed = smooth(z, p, restarts, initial_value=initial_value, implementation=implementation)
    # Slots past the last chunk are empty; the value that the row ends in is that of its last real one.
    is_chunk = (plan.segment_ids != 0)[:, :, None]
    last = jnp.where(is_chunk[:, 0], last_real(smoothed, plan.segment_ids), initial_value)
    upsampled = jnp.take_along_axis(smoothed, plan.slot[:, :, None], axis=1, mode="fill", fill_value=0)
    return jnp.where((plan.slot < z.shape[1])[:, :, None], upsampled, initial_value[:, None]), last


@typed
def smooth(
    z: Float[Array, "b c d"],
    p: Float[Array, "b c"],
    restarts: Bool[Array, "b c"],
    *,
    initial_value: Float[Array, "b d"] | None = None,
    implementation: SmoothingImplementation = "auto",
) -> Float[Array, "b c d"]:
    """Runs s_c = p_c z_c + (1 - p_c) s_{c-1} in float32; s_{c-1} counts as 0 where `restarts`.

    Args:
      initial_value: s before the first chunk; None means zeros.
      implementation: "reference" steps chunk by chunk, "associative" is a parallel scan; "auto" means
        "associative".
    """
    p = jnp.where(p < MIN_SMOOTHING, MIN_SMOOTHING, jnp.where(p > 1 - MIN_SMOOTHING, 1 - MIN_SMOOTHING, p))
    keep = jnp.where(restarts, 0.0, 1 - p)[:, :, None]
    write = p[:, :, None] * z.astype(jnp.float32)
    if initial_value is not None:
        write = write.at[:, 0].add(keep[:, 0] * initial_value)
    if implementation == "reference":
        return _scan_reference(keep, write)
    return jax.lax.associative_scan(_compose, (jnp.broadcast_to(keep, write.shape), write), axis=1)[1]


def _scan_reference(keep: jax.Array, write: jax.Array) -> jax.Array:
    def step(s, inputs):
        keep_c, write_c = inputs
        s = keep_c * s + write_c
        return s, s

    by_chunk = jnp.swapaxes(keep, 0, 1), jnp.swapaxes(write, 0, 1)  # [c, b, d]
    return jnp.swapaxes(jax.lax.scan(step, jnp.zeros_like(write[:, 0]), by_chunk)[1], 0, 1)


def _compose(first, second):
    """Two steps s -> keep * s + write as one."""
    return first[0] * second[0], second[0] * first[1] + second[1]


@typed
def straight_through(p: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Exactly 1 in the forward pass, with the gradient of `p` (eq. 7)."""
    return 1 + (p - jax.lax.stop_gradient(p))


@typed
def ratio_loss(
    boundary_prob: Float[Array, "b t"],
    boundary_mask: Bool[Array, "b t"],
    mask: Bool[Array, "b t"],
    target: Scalar,
) -> Float[Array, ""]:
    """Pulls the fraction of boundaries towards 1 / target (eq. 10); it is 1 there.

    With F the fraction of real tokens that are boundaries, which carries no gradient, and G their mean
    probability: target / (target - 1) * ((target - 1) F G + (1 - F)(1 - G)).

    Args:
      mask: True = a real token; means run over those, across the whole batch.
      target: tokens per chunk to aim at, > 1.
    """
    count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)
    f = jnp.sum(boundary_mask & mask, dtype=jnp.float32) / count
    g = jnp.sum(jnp.where(mask, boundary_prob, 0), dtype=jnp.float32) / count
    return target / (target - 1) * ((target - 1) * f * g + (1 - f) * (1 - g))


class Router(nn.Module):
    """Boundary probabilities from learned projections of neighbouring tokens, in float32.

    Both projections start as the identity: at first p is the raw cosine distance of neighbours.
    """

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"], state: RouterState | None = None
    ) -> tuple[Float[Array, "b t"], RouterState]:
        """Returns `boundary_probability` of the projected tokens, and what to go on from after them."""
        def project(name):
            identity = nn.with_logical_partitioning(
                lambda key, shape, dtype=jnp.float32: jnp.eye(*shape, dtype=dtype), ("embed", None))
            return nn.Dense(
                x.shape[-1], use_bias=False, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST,
                kernel_init=identity, name=name)(x)

        query, key = project("query"), project("key")
        p = boundary_probability(query, key, segment_ids, state)
        before = state or RouterState.empty(x.shape[0], x.shape[-1])
        is_read = jnp.any(segment_ids != 0, axis=1)
        last_query = jnp.where(is_read[:, None], last_real(query, segment_ids), before.last_query)
        return p, RouterState(last_query, before.has_seen | is_read)
