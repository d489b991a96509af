"""Native sparse attention as a layer."""
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, typed
from layers.attention.native_sparse import native_sparse_attention
from layers.mixers.sparse_attention import project_heads
from layers.nn.linear import Linear


class NativeSparseAttention(nn.Module):
    """NSA (arXiv 2502.11089): attention to summaries, selected blocks and a window, mixed by gates of the token.

    A summary is a learned weighting of the keys, or values, of its block. One row is one sequence.

    Attributes:
      num_selected: blocks that a token reads in full, its own and the first included.
      window: earlier tokens that the third branch sees.
      block: tokens in a block.
    """

    num_heads: int
    num_key_heads: int
    num_selected: int
    window: int
    block: int = 64
    rotary_width: int = 0
    init_std: float = 0.02
    dtype: jnp.dtype = jnp.float32
    implementation: str = "auto"

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        linear = partial(Linear, init_std=self.init_std, dtype=self.dtype)
        q, k, v = project_heads(
            x, None, num_heads=self.num_heads, num_key_heads=self.num_key_heads, init_std=self.init_std,
            rotary_width=self.rotary_width, dtype=self.dtype)
        gates = jax.nn.sigmoid(linear((self.num_heads, 3), ("embed", "heads", None), name="gates")(x))
        y = native_sparse_attention(
            q, k, v, self._summaries(k, "k_weights"), self._summaries(v, "v_weights"), gates,
            num_selected=self.num_selected, window=self.window, block=self.block,
            implementation=self.implementation)
        return linear((x.shape[-1],), ("heads", "head_width", "embed"), name="out")(y)

    def _summaries(self, x: jax.Array, name: str) -> jax.Array:
        """[b, t, n, k] -> [b, t // block, n, k]; at first the plain mean."""
        logits = self.param(name, nn.with_logical_partitioning(nn.initializers.zeros, (None, "heads")),
                            (self.block, x.shape[2]), jnp.float32)
        weights = jax.nn.softmax(logits, axis=0).astype(x.dtype)
        count = x.shape[1] // self.block
        blocks = x[:, : count * self.block].reshape(x.shape[0], count, self.block, *x.shape[2:])
        return jnp.einsum("bjsnk,sn->bjnk", blocks, weights)
