"""S5 as a layer."""
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from layers.array_types import Array, Float, Int, typed
from layers.mixers.mixer import Mixer
from layers.nn.linear import Linear
from layers.recurrences.diagonal import DiagonalImplementation
from layers.recurrences.s5 import s5
from layers.recurrences.state_space import Discretization, hippo_legs


class S5State(NamedTuple):
    """State of an S5 layer between two tokens."""

    h: jax.Array  # [b, n] complex64


class S5(Mixer):
    """`s5` followed by a gated linear unit, which mixes the channels.

    Attributes:
      state_size: N of the paper; half as many states are kept, each with its implied conjugate.
      num_blocks: copies of a smaller HiPPO-LegS spectrum that initialise the state.
      bidirectional: y also depends on later tokens; no initial state can then be given.
      min_step, max_step: bounds of the initial time per token, drawn log-uniformly.
      init_std, out_init_std: initial standard deviations of the gate and the output projection.
    """

    state_size: int = 64
    num_blocks: int = 1
    bidirectional: bool = False
    discretization: Discretization = "zoh"
    min_step: float = 1e-3
    max_step: float = 1e-1
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
        state: S5State | None = None,
    ) -> tuple[Float[Array, "b t d"], S5State]:
        """Returns the layer's output, 0 at padding, and the state after the last real token of each row.

        Raises:
          ValueError: state_size is not a multiple of 2 num_blocks, or a bidirectional layer was given a state.
        """
        if self.state_size % (2 * self.num_blocks):
            raise ValueError(f"state_size {self.state_size} is not a multiple of 2 * num_blocks = "
                             f"{2 * self.num_blocks}: states are kept in conjugate pairs")
        if self.bidirectional and state is not None:
            raise ValueError("a bidirectional S5 reads whole sequences; give no state, or set "
                             "bidirectional=False")
        width, num_states = x.shape[-1], self.state_size // 2
        spectrum, basis = _spectrum(self.state_size, self.num_blocks)

        def parameter(name, init, axes, shape):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape)

        def read_weights(name):
            init = partial(_complex_normal, transform=lambda z: z @ basis, drawn=(width, self.state_size))
            return jax.lax.complex(*parameter(name, init, (None, "embed", "state"), (2, width, num_states)))

        log_rate = parameter("log_rate", lambda *_: jnp.log(-spectrum.real), ("state",), (num_states,))
        frequency = parameter("frequency", lambda *_: jnp.asarray(spectrum.imag), ("state",), (num_states,))
        log_step = parameter("log_step", self._log_step_init, ("state",), (num_states,))
        b_init = partial(_complex_normal, transform=lambda z: basis.conj().T @ z, drawn=(self.state_size, width))
        b = parameter("b", b_init, (None, "state", "embed"), (2, num_states, width))
        skip = parameter("skip", nn.initializers.normal(1.0), ("embed",), (width,))
        y, last = s5(
            x, jax.lax.complex(-jnp.exp(log_rate), frequency), jax.lax.complex(*b), read_weights("c"), skip,
            jnp.exp(log_step), c_reverse=read_weights("c_reverse") if self.bidirectional else None,
            discretization=self.discretization, initial_state=None if state is None else state.h,
            segment_ids=segment_ids, implementation=self.implementation)
        y = jax.nn.gelu(y.astype(self.dtype))
        gate = Linear((width,), ("embed", "inner"), init_std=self.init_std, dtype=self.dtype, name="gate_proj")(y)
        y = Linear((width,), ("embed", "inner"), init_std=self.out_init_std, dtype=self.dtype, name="out")(y)
        return y * jax.nn.sigmoid(gate), S5State(last)

    def empty_state(self, batch: int, width: int, max_length: int = 0) -> S5State:
        """The state before the first token; it does not depend on the model width."""
        return S5State(jnp.zeros((batch, self.state_size // 2), jnp.complex64))

    def _log_step_init(self, key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, np.log(self.min_step), np.log(self.max_step))


def _spectrum(size: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the eigenvalues [n] above the real axis and eigenvectors [size, n] of block-diagonal HiPPO-LegS."""
    eigenvalues, vectors = hippo_legs(size // num_blocks)
    above = size // num_blocks // 2
    return (np.tile(eigenvalues[above:], num_blocks).astype(np.complex64),
            np.kron(np.eye(num_blocks), vectors[:, above:]).astype(np.complex64))


def _complex_normal(key, shape, dtype=jnp.float32, *, transform, drawn):
    """Draws a real matrix from N(0, 1 / columns); returns its parts in the basis of eigenvectors."""
    z = transform(jax.random.normal(key, drawn, dtype) * drawn[1] ** -0.5)
    return jnp.stack([jnp.real(z), jnp.imag(z)]).reshape(shape)
