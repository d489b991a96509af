"""Gated linear attention as a layer (arXiv 2312.06635, section 4.4)."""
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.mixers.mixer import Mixer
from layers.mixers.parts import GatedOutput, LowRank, num_heads_for
from layers.nn.linear import Linear
from layers.recurrences.gated_linear_attention import gated_linear_attention
from layers.recurrences.matrix import MatrixImplementation


class GLAState(NamedTuple):
    """State of a GLA layer between two tokens."""

    memory: jax.Array  # [b, h, k, v] float32


class GLA(Mixer):
    """`gated_linear_attention` with a decay per key channel, a norm per head and a SiLU gate.

    Attributes:
      state_size: k, the key dimension of the memory.
      expand: inner width over model width.
      head_width: v; inner width / head_width heads.
      decay_rank: features between the input and the decays.
      decay_temperature: divides the log of the sigmoid of the decay, so that memories fade slowly at first.
      init_std, out_init_std: initial standard deviations of the input and output projections.
    """

    state_size: int = 64
    expand: int = 1
    head_width: int = 128
    decay_rank: int = 16
    decay_temperature: float = 16.0
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
        state: GLAState | None = None,
    ) -> tuple[Float[Array, "b t d"], GLAState]:
        """Returns the layer's output, 0 at padding, and the state after the last real token of each row.

        Raises:
          ValueError: expand * d is not a multiple of head_width.
        """
        num_heads = num_heads_for(x.shape[-1], self.expand, self.head_width)

        def project(head_width, name):
            return Linear((num_heads, head_width), ("embed", "heads", "head_width"), init_std=self.init_std,
                          dtype=self.dtype, name=name)(x)

        per_key = (num_heads, self.state_size)
        axes = ("heads", "head_width")
        decay = LowRank(per_key, axes, self.decay_rank, self.init_std, self.dtype, name="decay")(x)
        bias = self.param("decay_bias", nn.with_logical_partitioning(nn.initializers.zeros, axes), per_key)
        log_decay = jax.nn.log_sigmoid(decay.astype(jnp.float32) + bias) / self.decay_temperature
        o, memory = gated_linear_attention(
            project(self.state_size, "q_proj"), project(self.state_size, "k_proj"),
            project(self.head_width, "v_proj"), log_decay, segment_ids=segment_ids,
            initial_state=None if state is None else state.memory,
            implementation=self.implementation)
        gate = jax.nn.silu(project(self.head_width, "gate_proj"))
        return GatedOutput(x.shape[-1], self.out_init_std, self.dtype, name="output")(o, gate), GLAState(memory)

    def empty_state(self, batch: int, width: int, max_length: int = 0) -> GLAState:
        """The state before the first token, at this model width."""
        num_heads = num_heads_for(width, self.expand, self.head_width)
        return GLAState(jnp.zeros((batch, num_heads, self.state_size, self.head_width), jnp.float32))
