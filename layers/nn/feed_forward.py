"""SwiGLU, the gated feed-forward network."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, typed
from layers.nn.linear import Linear


class SwiGLU(nn.Module):
    """Computes W_out (silu(W_gate x) * W_value x), without biases (arXiv 2002.05202, eq. 6).

    Attributes:
      width: features between the projections.
      init_std, out_init_std: initial standard deviations of the input and output projections.
    """

    width: int
    init_std: float = 0.02
    out_init_std: float = 0.02
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        value_gate = Linear(
            (2, self.width), ("embed", None, "mlp"), init_std=self.init_std, dtype=self.dtype, name="value_gate",
        )(x)
        value, gate = value_gate[..., 0, :], value_gate[..., 1, :]
        return Linear(
            (x.shape[-1],), ("mlp", "embed"), init_std=self.out_init_std, dtype=self.dtype, name="out",
        )(jax.nn.silu(gate) * value)
