"""S4D: one diagonal state space per channel, as a recurrence and as a convolution."""
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange

from layers.array_types import Array, Float, Inexact, Int, typed
from layers.arrays.exact import exact_einsum
from layers.recurrences.diagonal import DiagonalImplementation, diagonal_recurrence
from layers.recurrences.state_space import discretize

S4DImplementation = DiagonalImplementation | Literal["convolution"]


@typed
def s4d(
    x: Float[Array, "b t d"],
    log_dt: Float[Array, "d"],
    log_a_real: Float[Array, "d k"],
    a_imag: Float[Array, "d k"],
    c: Inexact[Array, "d k"],
    *,
    initial_state: Inexact[Array, "b d k"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: S4DImplementation = "auto",
) -> tuple[Float[Array, "b t d"], Inexact[Array, "b d k"]]:
    """Runs h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A x_t, and returns y_t = 2 Re(c . h_t), and the last h.

    S4D (arXiv 2206.11893) eq. 2 and 4, with A = -exp(log_a_real) + i a_imag. Each of the k states of a channel
    stands for itself and its conjugate. State and sums are complex64; y has the dtype of x.

    Args:
      c: complex weights of the states.
      initial_state: before the first token; None means zeros.
      segment_ids: 0 is padding, whose y is 0 and which leaves the state alone.
      implementation: those of `diagonal_recurrence`, which hold k complex numbers per number of x; or
        "convolution", by Fourier transforms, which does not. "auto" is "convolution" for more than one token
        without segment_ids, and otherwise the "auto" of `diagonal_recurrence`.
    Raises:
      NotImplementedError: "convolution" with segment_ids.
    """
    if implementation == "auto" and segment_ids is None and x.shape[1] > 1:
        implementation = "convolution"
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *c.shape), jnp.complex64)
    eigenvalues, dt = _continuous(log_dt, log_a_real, a_imag)
    exact, c, initial_state = x.astype(jnp.float32), c.astype(jnp.complex64), initial_state.astype(jnp.complex64)
    if implementation == "convolution":
        if segment_ids is not None:
            raise NotImplementedError('"convolution" has one kernel per row and cannot take segment_ids; use '
                                      "another implementation")
        y, last = _convolve(exact, eigenvalues, dt, c, initial_state)
        return y.astype(x.dtype), last
    a, gain = discretize(eigenvalues, dt)
    written = rearrange(gain * exact[..., None], "b t d k -> b t (d k)")
    h, last = diagonal_recurrence(
        written, a=jnp.broadcast_to(a.reshape(-1), written.shape),
        initial_state=rearrange(initial_state, "b d k -> b (d k)"), segment_ids=segment_ids,
        implementation=implementation)
    h = rearrange(h, "b t (d k) -> b t d k", k=c.shape[1])
    y = 2 * jnp.real(jnp.sum(c * h, axis=-1))
    return y.astype(x.dtype), rearrange(last, "b (d k) -> b d k", k=c.shape[1])


def _convolve(x, eigenvalues, dt, c, initial_state):
    """Returns y and the last state, as sums over the tokens and the initial state."""
    length, gain = x.shape[1], discretize(eigenvalues, dt)[1]
    powers = _powers(eigenvalues, dt, length + 1)  # [d, k, t + 1]
    kernel = 2 * jnp.real(exact_einsum("dk,dkt->td", c * gain, powers[..., :-1]))
    padded = 2 * length  # so that the end of the convolution does not wrap around to its start
    spectrum = jnp.fft.rfft(x, padded, axis=1) * jnp.fft.rfft(kernel, padded, axis=0)
    y = jnp.fft.irfft(spectrum, padded, axis=1)[:, :length]
    y = y + 2 * jnp.real(exact_einsum("bdk,dkt->btd", c * initial_state, powers[..., 1:]))
    written = exact_einsum("dkt,btd->bdk", jnp.flip(powers[..., :-1], axis=-1), x)
    last = powers[..., -1] * initial_state + gain * written
    return y, last


@typed
def s4d_kernel(
    log_dt: Float[Array, "d"],
    log_a_real: Float[Array, "d k"],
    a_imag: Float[Array, "d k"],
    c: Inexact[Array, "d k"],
    length: int,
) -> Float[Array, "d t"]:
    """Returns the response of `s4d` to a 1 followed by zeros, with which y is the convolution of x; float32."""
    eigenvalues, dt = _continuous(log_dt, log_a_real, a_imag)
    weights = c.astype(jnp.complex64) * discretize(eigenvalues, dt)[1]
    return 2 * jnp.real(exact_einsum("dk,dkt->dt", weights, _powers(eigenvalues, dt, length)))


def _continuous(log_dt, log_a_real, a_imag):
    """Returns eigenvalues [d, k] complex64 and dt [d, 1]."""
    log_dt, log_a_real, a_imag = (z.astype(jnp.float32) for z in (log_dt, log_a_real, a_imag))
    return jax.lax.complex(-jnp.exp(log_a_real), a_imag), jnp.exp(log_dt)[:, None]


def _powers(eigenvalues, dt, length):
    """Returns exp(dt A t), [d, k, t]; not as products of exp(dt A), whose rounding would grow with t."""
    return jnp.exp((eigenvalues * dt)[..., None] * jnp.arange(length, dtype=jnp.float32))
