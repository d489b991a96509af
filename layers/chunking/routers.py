"""Routers: modules that decide where a stage begins its chunks.

Every router is a linen module with one call and one more method:

  p, state = router(x, segment_ids, hints, state)     p [b, t] float32 in [0, 1]; a chunk begins where p > 1/2
  state    = router.empty_state(batch, width)         the state before the first token

p is 1 at the first token of every segment and 0 at padding. For the learned router p is a confidence; the others
return exactly 0 or 1. A state carries rows over from earlier calls: a row continues if its first segment is the
one that it was in; every other segment begins anew.
"""
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Int, typed
from layers.arrays.segments import carried_segment, last_real, last_segment, segment_positions, segment_starts


class RouterHints(NamedTuple):
    """Inputs of a router besides the vectors of its stage; None where there is none."""

    tokens: jax.Array | None = None           # [b, t] int32: bytes, at the outermost stage
    boundary_levels: jax.Array | None = None  # [b, t] int32: stages that are to begin a chunk here; 0 = none


NO_HINTS = RouterHints()


class CosineState(NamedTuple):
    last_query: jax.Array  # [b, d] float32: the query of the last real token
    segment: jax.Array     # [b] int32: the segment of that token; 0 before the first


class StrideState(NamedTuple):
    num_seen: jax.Array    # [b] int32: tokens so far of the segment that each row is in
    segment: jax.Array     # [b] int32


class SpaceState(NamedTuple):
    was_space: jax.Array   # [b] bool: the last byte was like a space
    segment: jax.Array     # [b] int32


class GivenState(NamedTuple):
    segment: jax.Array     # [b] int32


@typed
def boundary_probability(
    query: Float[Array, "b t d"],
    key: Float[Array, "b t d"],
    segment_ids: Int[Array, "b t"],
    state: CosineState | None = None,
) -> Float[Array, "b t"]:
    """Returns p_t = (1 - cos(query_{t-1}, key_t)) / 2 in float32: neighbours that differ start a chunk.

    H-Net (arXiv 2507.07955) eq. 4, with the query on the earlier token as in the release (the paper writes the
    opposite). p is 1 at the first token of every segment, without a gradient, and 0 at padding.

    Args:
      state: after earlier calls; None: rows begin here.
    """
    starts = segment_starts(segment_ids)
    previous = jnp.pad(query[:, :-1], ((0, 0), (1, 0), (0, 0)))
    if state is not None:
        previous = jnp.where(starts[:, :, None], state.last_query[:, None].astype(query.dtype), previous)
    p = (1 - jnp.einsum("btd,btd->bt", _normalise(previous), _normalise(key))) / 2
    # Not jnp.clip, which halves the gradient at a tie; and a cosine of exactly 1 is common (a repeated byte).
    p = jnp.where(p < 0, 0.0, jnp.where(p > 1, 1.0, p))
    return _certain(p, segment_ids, None if state is None else state.segment)


def _normalise(x: jax.Array) -> jax.Array:
    """Returns x / max(|x|, 1e-12) in float32, with a gradient of 0 rather than NaN where x is 0."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    is_zero = square == 0
    norm = jnp.sqrt(jnp.where(is_zero, 1.0, square))
    return jnp.where(is_zero, 0.0, x / jnp.maximum(norm, 1e-12))


def _certain(p: jax.Array, segment_ids: jax.Array, last_id: jax.Array | None) -> jax.Array:
    """Sets p to 1 at the first token of each segment, unless earlier calls began it, and to 0 at padding."""
    starts = segment_starts(segment_ids, None if last_id is None else carried_segment(segment_ids, last_id))
    return jnp.where(segment_ids == 0, 0.0, jnp.where(starts, 1.0, p))


def _last(x: jax.Array, segment_ids: jax.Array, before: jax.Array) -> jax.Array:
    """Takes the last real entry [b, *d] of x [b, t, *d]; that of `before` for a row of padding."""
    is_read = jnp.any(segment_ids != 0, axis=1)
    return jnp.where(is_read.reshape(-1, *[1] * (x.ndim - 2)), last_real(x, segment_ids), before)


class CosineRouter(nn.Module):
    """H-Net's router: `boundary_probability` of learned projections of neighbouring tokens, in float32.

    Both projections start as the identity: at first p is the raw cosine distance of neighbours.
    """

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"], hints: RouterHints = NO_HINTS,
        state: CosineState | None = None,
    ) -> tuple[Float[Array, "b t"], CosineState]:
        def project(name):
            identity = nn.with_logical_partitioning(
                lambda key, shape, dtype=jnp.float32: jnp.eye(*shape, dtype=dtype), ("embed", None))
            return nn.Dense(
                x.shape[-1], use_bias=False, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST,
                kernel_init=identity, name=name)(x)

        query, key = project("query"), project("key")
        p = boundary_probability(query, key, segment_ids, state)
        before = state or self.empty_state(x.shape[0], x.shape[-1])
        last_query = _last(query, segment_ids, before.last_query)
        return p, CosineState(last_query, last_segment(segment_ids, before.segment))

    def empty_state(self, batch: int, width: int) -> CosineState:
        return CosineState(jnp.zeros((batch, width), jnp.float32), jnp.zeros(batch, jnp.int32))


class StrideRouter(nn.Module):
    """A router of fixed width: every `stride`-th token of a segment, as in MegaByte (arXiv 2305.07185)."""

    stride: int

    @typed
    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"], hints: RouterHints = NO_HINTS,
        state: StrideState | None = None,
    ) -> tuple[Float[Array, "b t"], StrideState]:
        before = state or self.empty_state(x.shape[0], x.shape[-1])
        carried = carried_segment(segment_ids, before.segment)
        is_carried = (segment_ids != 0) & (segment_ids == carried[:, None])
        position = jnp.where(is_carried, before.num_seen[:, None], 0) + segment_positions(segment_ids)
        p = _certain((position % self.stride == 0).astype(jnp.float32), segment_ids, before.segment)
        num_seen = _last(position + 1, segment_ids, before.num_seen)
        return p, StrideState(num_seen, last_segment(segment_ids, before.segment))

    def empty_state(self, batch: int, width: int) -> StrideState:
        return StrideState(jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))


@typed
def is_spacelike(tokens: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    """Marks bytes that are no ASCII letter, no digit and no UTF-8 continuation with True (arXiv 2404.14408)."""
    in_words = ((ord("0"), ord("9")), (ord("A"), ord("Z")), (ord("a"), ord("z")), (0x80, 0xBF))
    return ~jnp.any(jnp.stack([(tokens >= low) & (tokens <= high) for low, high in in_words]), axis=0)


class SpaceRouter(nn.Module):
    """A router that cuts after words: at a spacelike byte that follows one which is not (arXiv 2404.14408)."""

    @typed
    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"], hints: RouterHints = NO_HINTS,
        state: SpaceState | None = None,
    ) -> tuple[Float[Array, "b t"], SpaceState]:
        if hints.tokens is None:
            raise ValueError('the router "space" needs the bytes: pass RouterHints(tokens=...)')
        before = state or self.empty_state(x.shape[0], x.shape[-1])
        is_space = is_spacelike(hints.tokens)
        # At the first real token of a row this looks back into the state, or is overruled by _certain.
        starts = segment_starts(segment_ids)
        was_space = jnp.where(starts, before.was_space[:, None], jnp.pad(is_space[:, :-1], ((0, 0), (1, 0))))
        p = _certain((is_space & ~was_space).astype(jnp.float32), segment_ids, before.segment)
        last = _last(is_space, segment_ids, before.was_space)
        return p, SpaceState(last, last_segment(segment_ids, before.segment))

    def empty_state(self, batch: int, width: int) -> SpaceState:
        return SpaceState(jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32))


class GivenRouter(nn.Module):
    """A router that cuts where its caller says: at tokens with `hints.boundary_levels` above 0."""

    @typed
    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"], hints: RouterHints = NO_HINTS,
        state: GivenState | None = None,
    ) -> tuple[Float[Array, "b t"], GivenState]:
        levels = hints.boundary_levels
        if levels is None:
            if not self.is_initializing():  # it draws parameters, and there are none
                raise ValueError('the router "given" needs boundary_levels [b, t]: pass them with the tokens')
            levels = jnp.zeros_like(segment_ids)
        before = state or self.empty_state(x.shape[0], x.shape[-1])
        p = _certain((levels > 0).astype(jnp.float32), segment_ids, before.segment)
        return p, GivenState(last_segment(segment_ids, before.segment))

    def empty_state(self, batch: int, width: int) -> GivenState:
        return GivenState(jnp.zeros(batch, jnp.int32))


RouterState = CosineState | StrideState | SpaceState | GivenState | Any
