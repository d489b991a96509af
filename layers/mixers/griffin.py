"""Griffin's recurrent block (arXiv 2402.19427, section 2.3)."""
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from layers.array_types import Array, Float, Int, typed
from layers.mixers.mixer import Mixer
from layers.nn.causal_conv import CausalDepthwiseConv
from layers.nn.linear import Linear
from layers.recurrences.diagonal import DiagonalImplementation
from layers.recurrences.rg_lru import RGLRUState, rg_lru


class GriffinState(NamedTuple):
    """State of a recurrent block between two tokens."""

    conv: jax.Array    # [b, taps - 1, inner]: inputs of the convolution, oldest first
    rg_lru: RGLRUState


class GriffinRecurrentBlock(Mixer):
    """A GELU branch times a branch of convolution and RG-LRU, between two projections; all with bias.

    Attributes:
      inner_width: width of the branches; None means the model width.
      num_heads: blocks of the block-diagonal gates; must divide the inner width.
      conv_taps: taps of the convolution before the RG-LRU.
      init_std, out_init_std: initial standard deviations of the input and output projections.
    """

    inner_width: int | None = None
    num_heads: int = 1
    conv_taps: int = 4
    init_std: float = 0.02
    out_init_std: float = 0.02
    implementation: DiagonalImplementation = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_ids: Int[Array, "b t"] | None = None,
        state: GriffinState | None = None,
    ) -> tuple[Float[Array, "b t d"], GriffinState]:
        """Returns the block's output, 0 at padding, and the state after the last real token of each row.

        Raises:
          ValueError: the inner width is not a multiple of num_heads.
        """
        width = x.shape[-1]
        inner = self.inner_width or width
        if inner % self.num_heads:
            raise ValueError(f"inner_width {inner} is not a multiple of num_heads {self.num_heads}")
        conv_state, rg_lru_state = state or (None, None)

        def biased(z, features, name, axes, std):
            bias = self.param(
                f"{name}_bias", nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]), (features,))
            z = Linear((features,), axes, init_std=std, dtype=self.dtype, name=name)(z)
            return z + bias.astype(self.dtype)

        gate = jax.nn.gelu(biased(x, inner, "gate_proj", ("embed", "inner"), self.init_std))
        u = biased(x, inner, "x_proj", ("embed", "inner"), self.init_std)
        u, conv_state = CausalDepthwiseConv(self.conv_taps, "inner", name="conv")(u, conv_state, segment_ids)

        a_param = self.param("a_param", nn.with_logical_partitioning(_a_param_init, ("inner",)), (inner,))
        h, rg_lru_state = rg_lru(
            u, _BlockDiagonal(self.num_heads, name="input_gate")(u),
            _BlockDiagonal(self.num_heads, name="recurrence_gate")(u), a_param, initial_state=rg_lru_state,
            segment_ids=segment_ids, implementation=self.implementation)
        y = biased(h * gate, width, "out", ("inner", "embed"), self.out_init_std)
        if segment_ids is not None:
            y = jnp.where((segment_ids != 0)[..., None], y, 0)
        return y, GriffinState(conv_state, rg_lru_state)

    def empty_state(self, batch: int, width: int, max_length: int = 0) -> GriffinState:
        """The state before the first token, at this model width."""
        inner = self.inner_width or width
        return GriffinState(
            jnp.zeros((batch, self.conv_taps - 1, inner), self.dtype), RGLRUState.empty(batch, inner))


class _BlockDiagonal(nn.Module):
    """Block-diagonal linear map with bias, in float32 as all gates are."""

    num_blocks: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = x.shape[-1] // self.num_blocks
        partitioned = nn.with_logical_partitioning
        kernel = self.param(
            "kernel", partitioned(nn.initializers.normal(block**-0.5), ("heads", None, None)),
            (self.num_blocks, block, block))
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("heads", None)), (self.num_blocks, block))
        blocks = rearrange(x.astype(jnp.float32), "b t (h i) -> b t h i", h=self.num_blocks)
        y = jnp.einsum("bthi,hij->bthj", blocks, kernel, precision=jax.lax.Precision.HIGHEST) + bias
        return rearrange(y, "b t h j -> b t (h j)")


def _a_param_init(key, shape, dtype=jnp.float32):
    """Samples a_param so that exp(-softplus(a_param)) is uniform by area on the ring 0.9..0.999."""
    radius = jnp.sqrt(jax.random.uniform(key, shape, dtype, 0.9**2, 0.999**2))
    return jnp.log(1 / radius - 1)
