"""Native sparse attention as a layer."""
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.attention.native_sparse import native_sparse_attention
from layers.attention.segment_blocks import begin_with_the_row, native_sparse_in_segments
from layers.cache.kv_cache import KVCache, KVUpdate
from layers.cache.policies import KeepAll
from layers.cache.policy import CachePolicy
from layers.mixers.cached_mixer import CachedMixer
from layers.mixers.sparse_attention import project_heads, tokens_of, with_cache
from layers.nn.linear import Linear
from layers.nn.rotary import RotaryScaling


class NativeSparseAttention(CachedMixer):
    """NSA (arXiv 2502.11089): attention to summaries, selected blocks and a window, mixed by gates of the token.

    A summary is a learned weighting of the keys, or values, of its block. Blocks begin with their segment; rows
    that are one segment each are read by the op for whole rows, others and those with a cache cost as dense
    attention.

    Attributes:
      num_heads, num_key_heads: of queries, which must divide the width, and of keys, which must divide those.
      num_selected: blocks that a token reads in full, its own and the first included.
      window: earlier tokens that the third branch sees.
      block: tokens in a block.
      rotary_width: features of each head that are rotated; 0 = none.
      rotary_base, rotary_scaling: see `rotary`.
      cache_dtype: of the keys and values that a cache keeps; None = dtype.
      init_std, out_init_std: standard deviations of the input and output projections at the start.
    """

    num_heads: int
    num_key_heads: int
    num_selected: int
    window: int
    block: int = 64
    rotary_width: int = 0
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling | None = None
    cache_dtype: jnp.dtype | None = None
    init_std: float = 0.02
    out_init_std: float = 0.02
    dtype: jnp.dtype = jnp.float32
    implementation: str = "auto"

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"] | None = None, state: KVCache | None = None
    ) -> tuple[Float[Array, "b t d"], KVUpdate | None]:
        """Returns the output, and the update of the cache (None if there was none).

        Raises:
          ValueError: the heads do not come out even.
        """
        linear = partial(Linear, dtype=self.dtype)
        tokens = tokens_of(x, segment_ids, state)
        q, k, v = project_heads(
            x, tokens.position[:, 0], num_heads=self.num_heads, num_key_heads=self.num_key_heads,
            init_std=self.init_std, dtype=self.dtype, rotary_width=self.rotary_width,
            rotary_base=self.rotary_base, rotary_scaling=self.rotary_scaling)
        gates = linear((self.num_heads, 3), ("embed", "heads", None), init_std=self.init_std, name="gates")(x)
        gates = jax.nn.sigmoid(gates)
        k_weights, v_weights = self._weights("k_weights"), self._weights("v_weights")

        def whole_rows() -> jax.Array:
            return native_sparse_attention(
                q, k, v, _summaries(k, k_weights), _summaries(v, v_weights), gates, num_selected=self.num_selected,
                window=self.window, block=self.block, implementation=self.implementation)

        def in_segments(k, v, kv_tokens) -> jax.Array:
            return native_sparse_in_segments(
                q, k, v, gates, k_weights, v_weights, tokens, kv_tokens, num_selected=self.num_selected,
                window=self.window)

        update = None
        if state is not None:
            keys, update = with_cache(state, k, v, segment_ids)
            y = in_segments(keys.k, keys.v, keys.tokens)
        elif x.shape[1] < self.block:  # there is no summary to read
            y = in_segments(k, v, tokens)
        elif segment_ids is None:
            y = whole_rows()
        else:
            y = jax.lax.cond(begin_with_the_row(tokens), whole_rows, lambda: in_segments(k, v, tokens))
        y = linear((x.shape[-1],), ("heads", "head_width", "embed"), init_std=self.out_init_std, name="out")(y)
        return y, update

    def _weights(self, name: str) -> jax.Array:
        """[block, n] of a summary; at first those of the plain mean."""
        logits = self.param(name, nn.with_logical_partitioning(nn.initializers.zeros, (None, "heads")),
                            (self.block, self.num_key_heads), jnp.float32)
        return jax.nn.softmax(logits, axis=0)

    @property
    def cache_policy(self) -> CachePolicy:
        return KeepAll()

    def empty_state(self, batch: int, width: int, max_length: int) -> KVCache:
        """Makes an empty cache for segments of up to `max_length` tokens."""
        return self.empty_cache(batch, max_length, self.num_key_heads, width // self.num_heads)


def _summaries(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[b, t, n, k] -> [b, t // block, n, k]."""
    block = weights.shape[0]
    count = x.shape[1] // block
    blocks = x[:, : count * block].reshape(x.shape[0], count, block, *x.shape[2:])
    return jnp.einsum("bjsnk,sn->bjnk", blocks, weights.astype(x.dtype))
