"""S5: one diagonal state space for all channels together."""
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from layers.array_types import Array, Float, Inexact, Int, typed
from layers.nn.linear import Linear
from layers.recurrences.diagonal import DiagonalImplementation, diagonal_recurrence
from layers.recurrences.state_space import Discretization, discretize, hippo_legs


@typed
def s5(
    x: Float[Array, "b t d"],
    eigenvalues: Inexact[Array, "n"],
    b: Inexact[Array, "n d"],
    c: Inexact[Array, "d n"],
    skip: Float[Array, "d"],
    step: Float[Array, "n"],
    *,
    c_reverse: Inexact[Array, "d n"] | None = None,
    discretization: Discretization = "zoh",
    conj_sym: bool = True,
    initial_state: Inexact[Array, "b n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: DiagonalImplementation = "auto",
) -> tuple[Float[Array, "b t d"], Inexact[Array, "b n"]]:
    """Runs h_t = a h_{t-1} + gain b x_t, and returns y_t = 2 Re(c h_t) + skip x_t, and the last h, complex64.

    S5 (arXiv 2208.04933) eq. 3 to 6; a and gain are those of `discretize`. y has the dtype of x, and is 0 at
    padding.

    Args:
      eigenvalues, step: of the continuous state space, real parts below 0, and time per token.
      c_reverse: weights of a second state, of the same recurrence run from the last token to the first.
      conj_sym: each state stands for itself and its conjugate; else y_t = Re(c h_t) + skip x_t.
      initial_state: before the first token; None means zeros. The state that is returned is the forward one.
      segment_ids, implementation: as of `diagonal_recurrence`.
    """
    a, gain = discretize(eigenvalues.astype(jnp.complex64), step.astype(jnp.float32), discretization)
    exact = x.astype(jnp.float32)
    written = _complex_matmul(exact, gain[:, None] * b)

    def run(reverse, state):
        return diagonal_recurrence(
            written, a=jnp.broadcast_to(a, written.shape), initial_state=state, segment_ids=segment_ids,
            reverse=reverse, implementation=implementation)

    h, last = run(False, initial_state)
    read = _complex_matmul(h, c)
    if c_reverse is not None:
        read = read + _complex_matmul(run(True, None)[0], c_reverse)
    y = (2 if conj_sym else 1) * jnp.real(read) + skip * exact
    if segment_ids is not None:
        y = jnp.where((segment_ids != 0)[..., None], y, 0)
    return y.astype(x.dtype), last


class S5State(NamedTuple):
    """What an S5 layer carries from one token to the next."""

    h: jax.Array  # [b, n] complex64


class S5(nn.Module):
    """`s5`, and a gated linear unit to mix what it reads.

    Attributes:
      state_size: n of the paper; half as many are kept, each for itself and its conjugate.
      num_blocks: copies of a smaller HiPPO-LegS spectrum with which the state starts.
      bidirectional: y also depends on what comes later; then no state can be given.
      min_step, max_step: time per token at the start, drawn log-uniformly between them.
      init_std, out_init_std: standard deviations of the gate and the output projection at the start.
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
        initial_state: S5State | None = None,
    ) -> tuple[Float[Array, "b t d"], S5State]:
        """Returns the layer's output, 0 at padding, and the state after the last real token of each row.

        Raises:
          ValueError: state_size is not a multiple of 2 num_blocks, or a bidirectional layer was given a state.
        """
        if self.state_size % (2 * self.num_blocks):
            raise ValueError(f"state_size {self.state_size} is not a multiple of 2 * num_blocks = "
                             f"{2 * self.num_blocks}: states are kept in conjugate pairs")
        if self.bidirectional and initial_state is not None:
            raise ValueError("a bidirectional S5 reads whole sequences; give no initial_state, or set "
                             "bidirectional=False")
        width, kept = x.shape[-1], self.state_size // 2
        spectrum, basis = _spectrum(self.state_size, self.num_blocks)

        def parameter(name, init, axes, shape):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape)

        def read_weights(name):
            init = partial(_complex_normal, transform=lambda z: z @ basis, drawn=(width, self.state_size))
            return jax.lax.complex(*parameter(name, init, (None, "embed", "state"), (2, width, kept)))

        log_rate = parameter("log_rate", lambda *_: jnp.log(-spectrum.real), ("state",), (kept,))
        frequency = parameter("frequency", lambda *_: jnp.asarray(spectrum.imag), ("state",), (kept,))
        log_step = parameter("log_step", self._log_step_init, ("state",), (kept,))
        b_init = partial(_complex_normal, transform=lambda z: basis.conj().T @ z, drawn=(self.state_size, width))
        b = parameter("b", b_init, (None, "state", "embed"), (2, kept, width))
        skip = parameter("skip", nn.initializers.normal(1.0), ("embed",), (width,))
        y, last = s5(
            x, jax.lax.complex(-jnp.exp(log_rate), frequency), jax.lax.complex(*b), read_weights("c"), skip,
            jnp.exp(log_step), c_reverse=read_weights("c_reverse") if self.bidirectional else None,
            discretization=self.discretization, initial_state=None if initial_state is None else initial_state.h,
            segment_ids=segment_ids, implementation=self.implementation)
        y = jax.nn.gelu(y.astype(self.dtype))
        gate = Linear((width,), ("embed", "inner"), init_std=self.init_std, dtype=self.dtype, name="gate_proj")(y)
        y = Linear((width,), ("embed", "inner"), init_std=self.out_init_std, dtype=self.dtype, name="out")(y)
        return y * jax.nn.sigmoid(gate), S5State(last)

    def empty_state(self, batch: int, width: int) -> S5State:
        """The state before the first token; it does not depend on the model width."""
        return S5State(jnp.zeros((batch, self.state_size // 2), jnp.complex64))

    def _log_step_init(self, key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, np.log(self.min_step), np.log(self.max_step))


def _spectrum(size: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a block-diagonal HiPPO-LegS matrix: eigenvalues [n] above the real axis, eigenvectors [size, n]."""
    eigenvalues, vectors = hippo_legs(size // num_blocks)
    above = size // num_blocks // 2
    return (np.tile(eigenvalues[above:], num_blocks).astype(np.complex64),
            np.kron(np.eye(num_blocks), vectors[:, above:]).astype(np.complex64))


def _complex_normal(key, shape, dtype=jnp.float32, *, transform, drawn):
    """A real matrix from N(0, 1 / columns) in the basis of the eigenvectors; real parts, then imaginary ones."""
    z = transform(jax.random.normal(key, drawn, dtype) * drawn[1] ** -0.5)
    return jnp.stack([jnp.real(z), jnp.imag(z)]).reshape(shape)


def _complex_matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.einsum("btj,ij->bti", x, matrix.astype(jnp.complex64), precision=jax.lax.Precision.HIGHEST)
