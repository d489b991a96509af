"""S4D: one diagonal state space per channel, as a recurrence and as the kernel of a convolution."""
import jax
import jax.numpy as jnp
from einops import rearrange

from layers.array_types import Array, Float, Inexact, Int, typed
from layers.diagonal_recurrence import DiagonalImplementation, diagonal_recurrence
from layers.state_space import discretize


@typed
def s4d(
    x: Float[Array, "b t d"],
    log_dt: Float[Array, "d"],
    log_a_real: Float[Array, "d n"],
    a_imag: Float[Array, "d n"],
    c: Inexact[Array, "d n"],
    *,
    initial_state: Inexact[Array, "b d n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: DiagonalImplementation = "auto",
) -> tuple[Float[Array, "b t d"], Inexact[Array, "b d n"]]:
    """Runs h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A x_t, and returns y_t = 2 Re(c . h_t), and the last h.

    S4D (arXiv 2206.11893) eq. 2 and 4, with A = -exp(log_a_real) + i a_imag. Each of the n states of a channel
    stands for itself and its conjugate. State and sums are complex64; y has the dtype of x.

    Args:
      c: complex weights of the states.
      initial_state: before the first token; None means zeros.
      segment_ids, implementation: as of `diagonal_recurrence`.
    """
    a, gain = discretize(*_continuous(log_dt, log_a_real, a_imag))
    num_states = a.shape[1]
    written = rearrange(gain * x[..., None].astype(jnp.float32), "b t d n -> b t (d n)")
    h, last = diagonal_recurrence(
        written, a=jnp.broadcast_to(a.reshape(-1), written.shape),
        initial_state=None if initial_state is None else rearrange(initial_state, "b d n -> b (d n)"),
        segment_ids=segment_ids, implementation=implementation)
    h = rearrange(h, "b t (d n) -> b t d n", n=num_states)
    y = 2 * jnp.real(jnp.sum(c.astype(jnp.complex64) * h, axis=-1))
    return y.astype(x.dtype), rearrange(last, "b (d n) -> b d n", n=num_states)


@typed
def s4d_kernel(
    log_dt: Float[Array, "d"],
    log_a_real: Float[Array, "d n"],
    a_imag: Float[Array, "d n"],
    c: Inexact[Array, "d n"],
    length: int,
) -> Float[Array, "d t"]:
    """What `s4d` answers to a 1 followed by zeros, so that y is the causal convolution of x with it; float32."""
    eigenvalues, dt = _continuous(log_dt, log_a_real, a_imag)
    # Not products of exp(dt A): what one is rounded by would grow with the length.
    powers = jnp.exp((eigenvalues * dt)[..., None] * jnp.arange(length, dtype=jnp.float32))  # [d, n, t]
    weights = c.astype(jnp.complex64) * discretize(eigenvalues, dt)[1]
    return 2 * jnp.real(jnp.einsum("dn,dnt->dt", weights, powers, precision=jax.lax.Precision.HIGHEST))


def _continuous(log_dt, log_a_real, a_imag):
    exact = [z.astype(jnp.float32) for z in (log_dt, log_a_real, a_imag)]
    return jax.lax.complex(-jnp.exp(exact[1]), exact[2]), jnp.exp(exact[0])[:, None]
