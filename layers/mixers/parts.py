"""What the layers with a matrix state share: projections to heads, and the way back."""
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
        initial_state: Float[Array, "b s i"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t h w"], Float[Array, "b s i"]]:
        """Returns the heads, and the last taps - 1 inputs of the convolution."""
        inner = self.num_heads * self.head_width
        flat = Linear((inner,), ("embed", "inner"), init_std=self.init_std, dtype=self.dtype, name="proj")(x)
        flat, state = CausalDepthwiseConv(self.taps, "inner", name="conv")(flat, initial_state, segment_ids)
        return jax.nn.silu(flat).reshape(*x.shape[:2], self.num_heads, self.head_width), state


class LowRank(nn.Module):
    """Two linear maps with `rank` features between them, as gates of many channels are often made."""

    features: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    rank: int
    init_std: float
    dtype: jnp.dtype
    between: Callable[[jax.Array], jax.Array] = lambda x: x  # what is done to the `rank` features

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        small = Linear((self.rank,), ("embed", None), init_std=self.init_std, dtype=self.dtype, name="down")(x)
        return Linear(self.features, (None, *self.logical_axes), init_std=self.init_std, dtype=self.dtype,
                      name="up")(self.between(small))


class GatedOutput(nn.Module):
    """A norm within each head, times a gate if there is one, and the projection to the model width."""

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


def unit(x: jax.Array) -> jax.Array:
    """x over its norm along the last axis, in float32; a vector of zeros stays one."""
    exact = x.astype(jnp.float32)
    return exact * jax.lax.rsqrt(jnp.sum(exact * exact, axis=-1, keepdims=True) + 1e-6)


def num_heads_for(width: int, expand: int, head_width: int) -> int:
    """Heads of `head_width` in `expand * width`.

    Raises:
      ValueError: they do not come out even.
    """
    if expand * width % head_width:
        raise ValueError(f"expand * width = {expand * width} is not a multiple of head_width {head_width}")
    return expand * width // head_width
