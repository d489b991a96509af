"""minGRU between two projections."""
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.mixers.mixer import Mixer
from layers.nn.linear import Linear
from layers.recurrences.diagonal import DiagonalImplementation
from layers.recurrences.min_gru import min_gru


class MinGRUState(NamedTuple):
    """State of a minGRU layer between two tokens."""

    h: jax.Array  # [b, inner] float32


class MinGRU(Mixer):
    """`min_gru` between two projections.

    Attributes:
      inner_width: width of the state; None means the model width.
      init_std, out_init_std: initial standard deviations of the input and output projections.
    """

    inner_width: int | None = None
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
        state: MinGRUState | None = None,
    ) -> tuple[Float[Array, "b t d"], MinGRUState]:
        """Returns the layer's output, 0 at padding, and the state after the last real token of each row."""
        width = x.shape[-1]

        def project(name):
            return Linear((self.inner_width or width,), ("embed", "inner"), init_std=self.init_std,
                          dtype=self.dtype, name=name)(x)

        h, last = min_gru(
            project("hidden_proj"), project("gate_proj"),
            initial_state=None if state is None else state.h, segment_ids=segment_ids,
            implementation=self.implementation)
        y = Linear((width,), ("inner", "embed"), init_std=self.out_init_std, dtype=self.dtype, name="out")(h)
        return y, MinGRUState(last)

    def empty_state(self, batch: int, width: int, max_length: int = 0) -> MinGRUState:
        """The state before the first token, at this model width."""
        return MinGRUState(jnp.zeros((batch, self.inner_width or width), jnp.float32))
