"""Causal self-attention that reads what a pattern chooses, as a layer."""
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.arrays.segments import segment_positions
from layers.nn.linear import Linear
from layers.nn.rotary import rotary

Segments = Int[Array, "b t"] | None


class SparseAttention(nn.Module):
    """Causal self-attention with rotary positions that reads what `attend` chooses, without biases.

      SparseAttention(num_heads=8, num_key_heads=2, attend=functools.partial(moba_attention, top_k=4))

    Attributes:
      num_heads, num_key_heads: of queries, which must divide the width, and of keys, which must divide those.
      attend: one of this module's functions, with its own arguments filled in.
      rotary_width: features of each head that are rotated; 0 = none.
    """

    num_heads: int
    num_key_heads: int
    attend: Callable[..., jax.Array]
    rotary_width: int = 0
    init_std: float = 0.02
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b t d"], segment_ids: Segments = None) -> Float[Array, "b t d"]:
        project = partial(project_heads, init_std=self.init_std, rotary_width=self.rotary_width, dtype=self.dtype)
        q, k, v = project(x, segment_ids, num_heads=self.num_heads, num_key_heads=self.num_key_heads)
        return Linear((x.shape[-1],), ("heads", "head_width", "embed"), init_std=self.init_std, dtype=self.dtype,
                      name="out")(self.attend(q, k, v, segment_ids))


def project_heads(
    x: jax.Array, segment_ids: jax.Array | None, *, num_heads: int, num_key_heads: int, init_std: float,
    rotary_width: int, dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes the q, k and v of a layer, with parameters "q", "k" and "v"; called inside its compact method."""
    width = x.shape[-1]
    if width % num_heads or num_heads % num_key_heads:
        raise ValueError(f"num_key_heads {num_key_heads} must divide num_heads {num_heads}, which must divide the "
                         f"width {width}")

    def project(name: str, count: int) -> jax.Array:
        axes = ("embed", "heads", "head_width")
        return Linear((count, width // num_heads), axes, init_std=init_std, dtype=dtype, name=name)(x)

    if segment_ids is None:
        segment_ids = jnp.ones(x.shape[:2], jnp.int32)
    positions = segment_positions(segment_ids)
    q, k = (rotary(project(name, count), positions, width=rotary_width)
            for name, count in (("q", num_heads), ("k", num_key_heads)))
    return q, k, project("v", num_key_heads)
