"""Root-mean-square normalisation, computed in float32 for inputs of any dtype."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, typed


@typed
def rms_norm(
    x: Float[Array, "*axes d"], scale: Float[Array, "d"], *, epsilon: float = 1e-5
) -> Float[Array, "*axes d"]:
    """Returns scale * x / sqrt(mean(x^2) + epsilon) over the last axis (arXiv 1910.07467), in x's dtype."""
    exact = x.astype(jnp.float32)
    mean_square = jnp.mean(exact * exact, axis=-1, keepdims=True)
    return (exact * jax.lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale, initially 1."""

    logical_axis: str = "norm"
    epsilon: float = 1e-5

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.logical_axis,))
        return rms_norm(x, self.param("scale", init, (x.shape[-1],)), epsilon=self.epsilon)
