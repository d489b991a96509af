"""Multi-head causal self-attention as a layer."""
import flax.linen as nn
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.arrays.segments import segment_positions
from layers.attention.attend import AttentionImplementation, dot_product_attention
from layers.cache.kv_cache import KVCache, KVUpdate, cached_attention
from layers.nn.linear import Linear
from layers.nn.rotary import rotary


class Attention(nn.Module):
    """Multi-head causal self-attention with rotary positions, without biases.

    Positions restart with every segment; with a cache each row is one segment, which the cache began.

    Attributes:
      num_heads: heads; must divide the width of the input.
      rotary_width: features of each head that are rotated; 0 = none.
      window: earlier tokens that are seen; -1 = all.
      init_std, out_init_std: standard deviations of the input and output projections at the start.
    """

    num_heads: int
    rotary_width: int
    window: int = -1
    init_std: float = 0.02
    out_init_std: float = 0.02
    implementation: AttentionImplementation = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_ids: Int[Array, "b t"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "b t d"], KVUpdate | None]:
        """Returns the output, and what the real tokens are to add to the cache (None if there was none)."""
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {self.num_heads}")
        if segment_ids is None:
            segment_ids = jnp.ones(x.shape[:2], jnp.int32)
        is_real = segment_ids != 0
        qkv = Linear(
            (3, self.num_heads, width // self.num_heads), ("embed", None, "heads", "head_width"),
            init_std=self.init_std, dtype=self.dtype, name="qkv")(x)
        positions = segment_positions(segment_ids) if cache is None else cache.positions_of(is_real)
        q = rotary(qkv[:, :, 0], positions, width=self.rotary_width)
        k = rotary(qkv[:, :, 1], positions, width=self.rotary_width)
        v = qkv[:, :, 2]
        update = None
        if cache is None:
            y = dot_product_attention(
                q, k, v, window=self.window, segment_ids=segment_ids, implementation=self.implementation)
        else:
            update = KVUpdate(k.astype(cache.k.dtype), v.astype(cache.v.dtype), positions)
            y = cached_attention(q, cache, update, window=self.window)
        y = Linear(
            (width,), ("heads", "head_width", "embed"),
            init_std=self.out_init_std, dtype=self.dtype, name="out")(y)
        return y, update
