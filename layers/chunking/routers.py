"""Routers: where a stage begins its chunks.

Every router is a linen module with one call and one more method:

  p, state = router(x, segment_ids, hints, state)     p [b, t] float32 in [0, 1]; a chunk begins where p > 1/2
  state    = router.empty_state(batch, width)         what it remembers before the first token

p is 1 at the first token of every segment and 0 at padding. With a state, rows go on from earlier tokens: each
row is then one segment, which those began. `p` tells the learned router's confidence; the others are sure.
"""
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Int, typed
from layers.arrays.segments import last_real, segment_positions, segment_starts


class RouterHints(NamedTuple):
    """What a router may look at besides the vectors of its stage; None where there is none."""

    tokens: jax.Array | None = None           # [b, t] int32: bytes, at the outermost stage
    boundary_levels: jax.Array | None = None  # [b, t] int32: stages that are to begin a chunk here; 0 = none


NO_HINTS = RouterHints()


class CosineState(NamedTuple):
    last_query: jax.Array  # [b, d] float32: the query of the last real token
    has_seen: jax.Array    # [b] bool: whether there was one


class StrideState(NamedTuple):
    num_seen: jax.Array    # [b] int32: real tokens so far


class SpaceState(NamedTuple):
    was_space: jax.Array   # [b] bool: the last byte was like a space
    has_seen: jax.Array    # [b] bool


class GivenState(NamedTuple):
    has_seen: jax.Array    # [b] bool


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
      state: where rows go on from earlier tokens; each row is then one segment, which those began.
    """
    starts = segment_starts(segment_ids)
    previous = jnp.pad(query[:, :-1], ((0, 0), (1, 0), (0, 0)))
    if state is not None:
        previous = jnp.where(starts[:, :, None], state.last_query[:, None].astype(query.dtype), previous)
    p = (1 - jnp.einsum("btd,btd->bt", _normalise(previous), _normalise(key))) / 2
    # Not jnp.clip, which halves the gradient at a tie; and a cosine of exactly 1 is common (a repeated byte).
    p = jnp.where(p < 0, 0.0, jnp.where(p > 1, 1.0, p))
    return _certain(p, segment_ids, None if state is None else state.has_seen)


def _normalise(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) in float32, with a gradient of 0 rather than NaN where x is 0."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    is_zero = square == 0
    norm = jnp.sqrt(jnp.where(is_zero, 1.0, square))
    return jnp.where(is_zero, 0.0, x / jnp.maximum(norm, 1e-12))


def _certain(p: jax.Array, segment_ids: jax.Array, has_seen: jax.Array | None) -> jax.Array:
    """Sets p to 1 at the first token of each segment, unless earlier tokens began it, and to 0 at padding."""
    starts = segment_starts(segment_ids)
    if has_seen is not None:
        starts = starts & ~has_seen[:, None]
    return jnp.where(segment_ids == 0, 0.0, jnp.where(starts, 1.0, p))


def _any_real(segment_ids: jax.Array) -> jax.Array:
    return jnp.any(segment_ids != 0, axis=1)


class CosineRouter(nn.Module):
    """H-Net's: `boundary_probability` of learned projections of neighbouring tokens, in float32.

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
        is_read = _any_real(segment_ids)
        last_query = jnp.where(is_read[:, None], last_real(query, segment_ids), before.last_query)
        return p, CosineState(last_query, before.has_seen | is_read)

    def empty_state(self, batch: int, width: int) -> CosineState:
        return CosineState(jnp.zeros((batch, width), jnp.float32), jnp.zeros(batch, bool))


class StrideRouter(nn.Module):
    """Fixed width: every `stride`-th token of a segment, as in MegaByte (arXiv 2305.07185)."""

    stride: int

    @typed
    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"], hints: RouterHints = NO_HINTS,
        state: StrideState | None = None,
    ) -> tuple[Float[Array, "b t"], StrideState]:
        num_new = jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
        num_seen = jnp.zeros(x.shape[0], jnp.int32) if state is None else state.num_seen
        position = num_seen[:, None] + segment_positions(segment_ids)
        p = _certain((position % self.stride == 0).astype(jnp.float32), segment_ids, num_seen > 0)
        return p, StrideState(num_seen + num_new)

    def empty_state(self, batch: int, width: int) -> StrideState:
        return StrideState(jnp.zeros(batch, jnp.int32))


@typed
def is_spacelike(tokens: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    """True for bytes that are no ASCII letter, no digit and no UTF-8 continuation (arXiv 2404.14408)."""
    in_words = ((ord("0"), ord("9")), (ord("A"), ord("Z")), (ord("a"), ord("z")), (0x80, 0xBF))
    return ~jnp.any(jnp.stack([(tokens >= low) & (tokens <= high) for low, high in in_words]), axis=0)


class SpaceRouter(nn.Module):
    """After words: a chunk begins at a spacelike byte that follows one which is not (arXiv 2404.14408)."""

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
        p = _certain((is_space & ~was_space).astype(jnp.float32), segment_ids, before.has_seen)
        is_read = _any_real(segment_ids)
        last = jnp.where(is_read, last_real(is_space, segment_ids), before.was_space)
        return p, SpaceState(last, before.has_seen | is_read)

    def empty_state(self, batch: int, width: int) -> SpaceState:
        return SpaceState(jnp.zeros(batch, bool), jnp.zeros(batch, bool))


class GivenRouter(nn.Module):
    """Boundaries that the caller brings: where `hints.boundary_levels` is above 0."""

    @typed
    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"], hints: RouterHints = NO_HINTS,
        state: GivenState | None = None,
    ) -> tuple[Float[Array, "b t"], GivenState]:
        levels = hints.boundary_levels
        if levels is None:
            if not self.is_initializing():  # which is about parameters, and there are none
                raise ValueError('the router "given" needs boundary_levels [b, t]: pass them with the tokens')
            levels = jnp.zeros_like(segment_ids)
        before = state or self.empty_state(x.shape[0], x.shape[-1])
        p = _certain((levels > 0).astype(jnp.float32), segment_ids, before.has_seen)
        return p, GivenState(before.has_seen | _any_real(segment_ids))

    def empty_state(self, batch: int, width: int) -> GivenState:
        return GivenState(jnp.zeros(batch, bool))


RouterState = CosineState | StrideState | SpaceState | GivenState | Any
