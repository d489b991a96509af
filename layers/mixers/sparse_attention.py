"""Causal self-attention that reads what a pattern chooses, as a layer."""
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.arrays.segments import segment_ordinals, segment_positions
from layers.attention.mask import TokenInfo
from layers.attention.segment_blocks import begin_with_the_row
from layers.cache.kv_cache import KVCache, KVUpdate, place
from layers.cache.policies import KeepAll
from layers.cache.policy import CachePolicy
from layers.mixers.cached_mixer import CachedMixer
from layers.nn.linear import Linear
from layers.nn.rotary import RotaryScaling, rotary


class SparseAttention(CachedMixer):
    """Causal self-attention with rotary positions that reads what `attend` chooses, without biases.

      SparseAttention(num_heads=8, num_key_heads=2, attend=partial(moba_attention, top_k=4),
                      attend_in_segments=partial(moba_in_segments, top_k=4))

    Attributes:
      num_heads, num_key_heads: of queries, which must divide the width, and of keys, which must divide those.
      attend: called with (q, k, v, segment_ids) of whole rows.
      attend_in_segments: called with (q, k, v, q_tokens, kv_tokens), for rows of several segments and for a cache,
        from which the same must be chosen as if every segment stood alone; see `segment_blocks`. None: there is no
        decoding, and rows are left to `attend` whatever their segments.
      rotary_width: features of each head that are rotated; 0 = none.
      rotary_base, rotary_scaling: see `rotary`.
      cache_dtype: of the keys and values that a cache keeps; None = dtype.
      init_std, out_init_std: standard deviations of the input and output projections at the start.
    """

    num_heads: int
    num_key_heads: int
    attend: Callable[..., jax.Array]
    attend_in_segments: Callable[..., jax.Array] | None = None
    rotary_width: int = 0
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling | None = None
    cache_dtype: jnp.dtype | None = None
    init_std: float = 0.02
    out_init_std: float = 0.02
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"] | None = None, state: KVCache | None = None
    ) -> tuple[Float[Array, "b t d"], KVUpdate | None]:
        """Returns the output, and the update of the cache (None if there was none).

        Raises:
          ValueError: the heads do not come out even.
          NotImplementedError: there is a state, and no attend_in_segments.
        """
        if state is not None and self.attend_in_segments is None:
            raise NotImplementedError("attend chooses from whole rows; give attend_in_segments to decode")
        tokens = tokens_of(x, segment_ids, state)
        q, k, v = project_heads(
            x, tokens.position[:, 0], num_heads=self.num_heads, num_key_heads=self.num_key_heads,
            init_std=self.init_std, dtype=self.dtype, rotary_width=self.rotary_width,
            rotary_base=self.rotary_base, rotary_scaling=self.rotary_scaling)
        update = None
        if state is not None:
            keys, update = with_cache(state, k, v, segment_ids)
            y = self.attend_in_segments(q, keys.k, keys.v, tokens, keys.tokens)
        elif segment_ids is None or self.attend_in_segments is None:
            y = self.attend(q, k, v, segment_ids)
        else:
            y = jax.lax.cond(
                begin_with_the_row(tokens), lambda: self.attend(q, k, v, segment_ids),
                lambda: self.attend_in_segments(q, k, v, tokens, tokens))
        y = Linear((x.shape[-1],), ("heads", "head_width", "embed"), init_std=self.out_init_std, dtype=self.dtype,
                   name="out")(y)
        return y, update

    @property
    def cache_policy(self) -> CachePolicy:
        return KeepAll()

    def empty_state(self, batch: int, width: int, max_length: int) -> KVCache:
        """Makes an empty cache for segments of up to `max_length` tokens."""
        return self.empty_cache(batch, max_length, self.num_key_heads, width // self.num_heads)


class Keys(NamedTuple):
    """Keys and values of a cache, and behind them those of new tokens."""

    k: jax.Array       # [b, s + t, n, k]
    v: jax.Array       # [b, s + t, n, v]
    tokens: TokenInfo  # [b, 1, s + t]


def tokens_of(x: jax.Array, segment_ids: jax.Array | None, cache: KVCache | None) -> TokenInfo:
    """Makes the positions of the tokens x [b, t, d] in their segments, and numbers the segments 1, 2, ..."""
    if segment_ids is None:
        segment_ids = jnp.ones(x.shape[:2], jnp.int32)
    if cache is not None:
        placement = place(cache, segment_ids)
        return TokenInfo(placement.positions[:, None], placement.segments[:, None])
    segments = jnp.where(segment_ids != 0, segment_ordinals(segment_ids), 0)
    return TokenInfo(segment_positions(segment_ids)[:, None], segments[:, None])


def with_cache(
    cache: KVCache, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> tuple[Keys, KVUpdate]:
    """Appends new keys and values [b, t, n, k] to those of the cache, and makes the update of the cache.

    All come in the dtype of the new ones, rounded to that of the cache.
    """
    if segment_ids is None:
        segment_ids = jnp.ones(k.shape[:2], jnp.int32)
    placement = place(cache, segment_ids)
    tokens = TokenInfo(
        jnp.concatenate([cache.positions, placement.positions[:, None]], axis=2),
        jnp.concatenate([placement.in_cache, placement.segments[:, None]], axis=2))
    is_seen = tokens.segment[:, 0, :, None, None] != 0
    stored_k, stored_v = k.astype(cache.k.dtype), v.astype(cache.v.dtype)
    all_k, all_v = (jnp.where(is_seen, jnp.concatenate([old.swapaxes(1, 2), new], axis=1), 0).astype(dtype)
                    for old, new, dtype in ((cache.k, stored_k, k.dtype), (cache.v, stored_v, v.dtype)))
    return Keys(all_k, all_v, tokens), KVUpdate(stored_k, stored_v, placement.positions, segment_ids)


def project_heads(
    x: jax.Array, positions: jax.Array, *, num_heads: int, num_key_heads: int, init_std: float, dtype: jnp.dtype,
    rotary_width: int, rotary_base: float, rotary_scaling: RotaryScaling | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes the q, k and v of a layer, with parameters "q", "k" and "v"; called inside its compact method."""
    width = x.shape[-1]
    if width % num_heads or num_heads % num_key_heads:
        raise ValueError(f"num_key_heads {num_key_heads} must divide num_heads {num_heads}, which must divide the "
                         f"width {width}")

    def project(name: str, count: int) -> jax.Array:
        axes = ("embed", "heads", "head_width")
        return Linear((count, width // num_heads), axes, init_std=init_std, dtype=dtype, name=name)(x)

    q, k = (rotary(project(name, count), positions, width=rotary_width, base=rotary_base, scaling=rotary_scaling)
            for name, count in (("q", num_heads), ("k", num_key_heads)))
    return q, k, project("v", num_key_heads)
