"""HGRN2 as a layer (arXiv 2404.07904), whose keys are one minus its forget gates."""
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.mixers.mixer import Mixer
from layers.mixers.parts import GatedOutput, num_heads_for
from layers.nn.linear import Linear
from layers.recurrences.gated_linear_attention import gated_linear_attention
from layers.recurrences.matrix import MatrixImplementation


class HGRN2State(NamedTuple):
    """State of an HGRN2 layer between two tokens."""

    memory: jax.Array  # [b, h, k, v] float32


class HGRN2(Mixer):
    """`gated_linear_attention` with k = 1 - f and decay f, and a norm per head.

    Attributes:
      state_size: k, the key dimension of the memory.
      expand: inner width over model width.
      head_width: v; inner width / head_width heads.
      lower_bound: smallest value of the forget gates f; in the paper it rises from layer to layer.
      init_std, out_init_std: initial standard deviations of the input and output projections.
    """

    state_size: int = 128
    expand: int = 1
    head_width: int = 128
    lower_bound: float = 0.0
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
        state: HGRN2State | None = None,
    ) -> tuple[Float[Array, "b t d"], HGRN2State]:
        """Returns the layer's output, 0 at padding, and the state after the last real token of each row.

        Raises:
          ValueError: expand * d is not a multiple of head_width, or lower_bound is not from 0 to below 1.
        """
        if not 0 <= self.lower_bound < 1:
            raise ValueError(f"lower_bound {self.lower_bound} must be from 0 to below 1")
        num_heads = num_heads_for(x.shape[-1], self.expand, self.head_width)

        def project(head_width, name):
            return Linear((num_heads, head_width), ("embed", "heads", "head_width"), init_std=self.init_std,
                          dtype=self.dtype, name=name)(x)

        forget = project(self.state_size, "forget_proj").astype(jnp.float32)
        # The log of f = lower_bound + (1 - lower_bound) sigmoid(forget); the key is 1 - f.
        log_free = jnp.log1p(-self.lower_bound)
        log_decay = jax.nn.log_sigmoid(forget) + log_free
        if self.lower_bound > 0:
            log_decay = jnp.logaddexp(log_decay, jnp.log(self.lower_bound))
        key = (1 - self.lower_bound) * jax.nn.sigmoid(-forget)
        o, memory = gated_linear_attention(
            jax.nn.silu(project(self.state_size, "q_proj")), key.astype(self.dtype),
            project(self.head_width, "v_proj"), log_decay, segment_ids=segment_ids, scale=1.0,
            initial_state=None if state is None else state.memory,
            implementation=self.implementation)
        return GatedOutput(x.shape[-1], self.out_init_std, self.dtype, name="output")(o), HGRN2State(memory)

    def empty_state(self, batch: int, width: int, max_length: int = 0) -> HGRN2State:
        """The state before the first token, at this model width."""
        num_heads = num_heads_for(width, self.expand, self.head_width)
        return HGRN2State(jnp.zeros((batch, num_heads, self.state_size, self.head_width), jnp.float32))
