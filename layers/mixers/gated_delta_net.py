"""Gated DeltaNet (arXiv 2412.06464) and KDA, Kimi Delta Attention (arXiv 2510.26692), as layers."""
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.mixers.mixer import Mixer
from layers.mixers.parts import ConvolvedHeads, GatedOutput, LowRank, l2_normalize, num_heads_for
from layers.nn.initializers import a_log_init, dt_bias_init
from layers.nn.linear import Linear
from layers.recurrences.gated_delta_rule import gated_delta_rule
from layers.recurrences.matrix import MatrixImplementation


class DeltaNetState(NamedTuple):
    """State of either layer between two tokens."""

    conv_q: jax.Array  # [b, taps - 1, h * k]: last inputs of the convolution over queries, oldest first
    conv_k: jax.Array  # [b, taps - 1, h * k]
    conv_v: jax.Array  # [b, taps - 1, h * v]
    memory: jax.Array  # [b, h, k, v] float32


class GatedDeltaNet(Mixer):
    """`gated_delta_rule` with a decay per head or per key channel, convolved unit keys and a gated norm per head.

    Attributes:
      state_size: k, the key dimension of the memory.
      expand: inner width over model width.
      head_width: v; inner width / head_width heads.
      conv_taps: taps of the convolutions over queries, keys and values.
      decays_per_channel: True is KDA, whose decays and output gate are low-rank maps through head_width features.
      may_negate: beta reaches 2, so that a memory can flip its sign (arXiv 2411.12537); otherwise 1.
      init_std, out_init_std: initial standard deviations of the input and output projections.
    """

    state_size: int = 64
    expand: int = 1
    head_width: int = 128
    conv_taps: int = 4
    decays_per_channel: bool = False
    may_negate: bool = False
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
        state: DeltaNetState | None = None,
    ) -> tuple[Float[Array, "b t d"], DeltaNetState]:
        """Returns the layer's output, 0 at padding, and the state after the last real token of each row.

        Raises:
          ValueError: expand * d is not a multiple of head_width.
        """
        num_heads = num_heads_for(x.shape[-1], self.expand, self.head_width)
        q, k, v = self._convolutions(num_heads)
        state = state or DeltaNetState(None, None, None, None)
        q, conv_q = q(x, state.conv_q, segment_ids)
        k, conv_k = k(x, state.conv_k, segment_ids)
        v, conv_v = v(x, state.conv_v, segment_ids)

        beta = jax.nn.sigmoid(self._linear((num_heads,), ("heads",), "beta_proj")(x).astype(jnp.float32))
        beta = 2 * beta if self.may_negate else beta
        o, memory = gated_delta_rule(
            l2_normalize(q), l2_normalize(k), v, beta, self._log_decay(x, num_heads),
            initial_state=state.memory, segment_ids=segment_ids, implementation=self.implementation)
        per_value, axes = (num_heads, self.head_width), ("heads", "head_width")
        if self.decays_per_channel:
            gate = jax.nn.sigmoid(self._low_rank(per_value, axes, "gate")(x))
        else:
            gate = jax.nn.silu(self._linear(per_value, axes, "gate_proj")(x))
        y = GatedOutput(x.shape[-1], self.out_init_std, self.dtype, name="output")(o, gate)
        return y, DeltaNetState(conv_q, conv_k, conv_v, memory)

    def _log_decay(self, x: jax.Array, num_heads: int) -> jax.Array:
        """Returns minus the rate of a head times the step of a token, as in Mamba-2: [b, t, h] or [b, t, h, k]."""
        a_log = self.param("a_log", nn.with_logical_partitioning(a_log_init, ("heads",)), (num_heads,))
        if self.decays_per_channel:
            shape, axes = (num_heads, self.state_size), ("heads", "head_width")
            step, rate = self._low_rank(shape, axes, "decay")(x), jnp.exp(a_log)[:, None]
        else:
            shape, axes = (num_heads,), ("heads",)
            step, rate = self._linear(shape, axes, "decay_proj")(x), jnp.exp(a_log)
        bias = self.param("dt_bias", nn.with_logical_partitioning(dt_bias_init, axes), shape)
        return -rate * jax.nn.softplus(step.astype(jnp.float32) + bias)

    def _convolutions(self, num_heads: int) -> tuple[ConvolvedHeads, ...]:
        """Returns the projections to queries, keys and values."""
        widths = {"q": self.state_size, "k": self.state_size, "v": self.head_width}
        return tuple(ConvolvedHeads(num_heads, width, self.conv_taps, self.init_std, self.dtype, name=name)
                     for name, width in widths.items())

    def _linear(self, features: tuple[int, ...], axes: tuple[str, ...], name: str) -> Linear:
        return Linear(features, ("embed", *axes), init_std=self.init_std, dtype=self.dtype, name=name)

    def _low_rank(self, features: tuple[int, ...], axes: tuple[str, ...], name: str) -> LowRank:
        return LowRank(features, axes, self.head_width, self.init_std, self.dtype, name=name)

    def empty_state(self, batch: int, width: int, max_length: int = 0) -> DeltaNetState:
        """The state before the first token, at this model width."""
        num_heads = num_heads_for(width, self.expand, self.head_width)
        key_inputs, value_inputs = (
            jnp.zeros((batch, self.conv_taps - 1, num_heads * size), self.dtype)
            for size in (self.state_size, self.head_width))
        memory = jnp.zeros((batch, num_heads, self.state_size, self.head_width), jnp.float32)
        return DeltaNetState(key_inputs, key_inputs, value_inputs, memory)
