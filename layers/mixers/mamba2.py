"""Mamba-2, the mixer of H-Net's outer stages (arXiv 2405.21060, section 7)."""
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from layers.array_types import Array, Float, Int, typed
from layers.mixers.mixer import Mixer
from layers.mixers.parts import num_heads_for
from layers.nn.causal_conv import CausalDepthwiseConv
from layers.nn.initializers import a_log_init, dt_bias_init
from layers.nn.linear import Linear
from layers.nn.norms import rms_norm
from layers.recurrences.matrix import MatrixImplementation
from layers.recurrences.ssd import ssd_scan


class Mamba2State(NamedTuple):
    """State of a Mamba-2 layer between two tokens."""

    conv_x: jax.Array   # [b, taps - 1, inner]: last inputs of the convolution over x, oldest first
    conv_bc: jax.Array  # [b, taps - 1, 2 * groups * k]: the same over keys and queries
    ssm: jax.Array      # [b, h, k, v] float32


class Mamba2(Mixer):
    """Gated SSD: project, convolve, scan, gate and normalise, project.

    The projections of the official fused in_proj are separate parameters, so that heads can be sharded.

    Attributes:
      state_size: k, the key dimension of the state.
      expand: inner width over model width.
      head_width: v; inner width / head_width heads.
      conv_taps: taps of the convolution before the scan.
      num_groups: heads of the keys and queries, each shared by equally many value heads.
      chunk_size: tokens per step of the scan in its chunkwise form; it changes speed, not results.
      init_std, out_init_std: initial standard deviations of the input and output projections.
    """

    state_size: int = 128
    expand: int = 2
    head_width: int = 64
    conv_taps: int = 4
    num_groups: int = 1
    chunk_size: int = 64
    init_std: float = 0.02
    out_init_std: float = 0.02
    implementation: MatrixImplementation = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_ids: Int[Array, "b t"] | None = None,
        state: Mamba2State | None = None,
    ) -> tuple[Float[Array, "b t d"], Mamba2State]:
        """Returns the layer's output and the state after the last real token of each row.

        Raises:
          ValueError: expand * d is not a multiple of head_width.
        """
        width = x.shape[-1]
        inner, num_heads = self.expand * width, num_heads_for(width, self.expand, self.head_width)
        conv_x_state, conv_bc_state, ssm_state = state or (None, None, None)

        def project(features, name, axis):
            return Linear((features,), ("embed", axis), init_std=self.init_std, dtype=self.dtype, name=name)(x)

        z = project(inner, "z_proj", "inner")
        values, conv_x_state = CausalDepthwiseConv(self.conv_taps, "inner", name="conv_x")(
            project(inner, "x_proj", "inner"), conv_x_state, segment_ids)
        bc, conv_bc_state = CausalDepthwiseConv(self.conv_taps, name="conv_bc")(
            project(2 * self.num_groups * self.state_size, "bc_proj", "state"), conv_bc_state, segment_ids)
        values = rearrange(jax.nn.silu(values), "b t (h v) -> b t h v", v=self.head_width)
        bc = rearrange(jax.nn.silu(bc), "b t (two n k) -> two b t n k", two=2, n=self.num_groups)

        per_head = nn.with_logical_partitioning
        dt_bias = self.param("dt_bias", per_head(dt_bias_init, ("heads",)), (num_heads,))
        a_log = self.param("a_log", per_head(a_log_init, ("heads",)), (num_heads,))
        skip = self.param("skip", per_head(nn.initializers.ones, ("heads",)), (num_heads,))
        dt = jax.nn.softplus(project(num_heads, "dt_proj", "heads").astype(jnp.float32) + dt_bias)
        log_decay = -jnp.exp(a_log) * dt  # [b, t, h]

        y, ssm_state = ssd_scan(
            (values * dt[..., None]).astype(self.dtype), log_decay, bc[0], bc[1], initial_state=ssm_state,
            segment_ids=segment_ids, implementation=self.implementation, chunk_size=self.chunk_size)
        y = rearrange(y + skip[:, None] * values, "b t h v -> b t (h v)")
        # The gate comes before the normalisation, and one norm spans all heads.
        scale = self.param("norm_scale", per_head(nn.initializers.ones, ("inner",)), (inner,))
        y = rms_norm(y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32)), scale)
        out = Linear(
            (width,), ("inner", "embed"), init_std=self.out_init_std, dtype=self.dtype, name="out")(y)
        return out, Mamba2State(conv_x_state, conv_bc_state, ssm_state)

    def empty_state(self, batch: int, width: int, max_length: int = 0) -> Mamba2State:
        """The state before the first token, at this model width."""
        num_heads = num_heads_for(width, self.expand, self.head_width)
        history = batch, self.conv_taps - 1
        return Mamba2State(
            jnp.zeros((*history, self.expand * width), self.dtype),
            jnp.zeros((*history, 2 * self.num_groups * self.state_size), self.dtype),
            jnp.zeros((batch, num_heads, self.state_size, self.head_width), jnp.float32))
