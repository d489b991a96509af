"""Parts shared by layers with a matrix state: projections to heads and back, and normalised keys."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.nn.causal_conv import CausalDepthwiseConv
from layers.nn.linear import Linear
from layers.nn.norms import rms_norm


class ConvolvedHeads(nn.Module):
    """Projects to heads through a short causal convolution over time and SiLU."""

    num_heads: int
    head_width: int
    taps: int
    init_std: float
    dtype: jnp.dtype

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "b t d"],
        initial_state: Float[Array, "b history inner"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t h v"], Float[Array, "b history inner"]]:
        """Returns the heads, and the last taps - 1 inputs of the convolution."""
        inner = self.num_heads * self.head_width
        flat = Linear((inner,), ("embed", "inner"), init_std=self.init_std, dtype=self.dtype, name="proj")(x)
        flat, state = CausalDepthwiseConv(self.taps, "inner", name="conv")(flat, initial_state, segment_ids)
        return jax.nn.silu(flat).reshape(*x.shape[:2], self.num_heads, self.head_width), state


class LowRank(nn.Module):
    """Two linear maps with `rank` features between them, a cheap way to make gates of many channels."""

    features: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    rank: int
    init_std: float
    dtype: jnp.dtype
    between: Callable[[jax.Array], jax.Array] = lambda x: x  # applied to the `rank` features

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        small = Linear((self.rank,), ("embed", None), init_std=self.init_std, dtype=self.dtype, name="down")(x)
        return Linear(self.features, (None, *self.logical_axes), init_std=self.init_std, dtype=self.dtype,
                      name="up")(self.between(small))


class GatedOutput(nn.Module):
    """Norm within each head, optional gate, and projection to the model width."""

    width: int
    init_std: float
    dtype: jnp.dtype

    @nn.compact
    @typed
    def __call__(
        self, o: Float[Array, "b t h v"], gate: Float[Array, "b t h v"] | None = None
    ) -> Float[Array, "b t d"]:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("head_width",))
        o = rms_norm(o, self.param("norm_scale", init, (o.shape[-1],)))
        o = o if gate is None else o * gate
        return Linear((self.width,), ("heads", "head_width", "embed"), init_std=self.init_std, dtype=self.dtype,
                      name="out")(o)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Divides x by its norm along the last axis, in float32; a vector of zeros stays zero."""
    exact = x.astype(jnp.float32)
    return exact * jax.lax.rsqrt(jnp.sum(exact * exact, axis=-1, keepdims=True) + 1e-6)


def num_heads_for(width: int, expand: int, head_width: int) -> int:
    """Returns how many heads of `head_width` fill `expand * width`.

    Raises:
      ValueError: expand * width is not a multiple of head_width.
    """
    if expand * width % head_width:
        raise ValueError(f"expand * width = {expand * width} is not a multiple of head_width {head_width}")
    return expand * width // head_width
