"""S5: one diagonal state space for all channels together."""
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Inexact, Int, typed
from layers.recurrences.diagonal import DiagonalImplementation, diagonal_recurrence
from layers.recurrences.state_space import Discretization, discretize


@typed
def s5(
    x: Float[Array, "b t d"],
    eigenvalues: Inexact[Array, "k"],
    b: Inexact[Array, "k d"],
    c: Inexact[Array, "d k"],
    skip: Float[Array, "d"],
    step: Float[Array, "k"],
    *,
    c_reverse: Inexact[Array, "d k"] | None = None,
    discretization: Discretization = "zoh",
    conj_sym: bool = True,
    initial_state: Inexact[Array, "b k"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: DiagonalImplementation = "auto",
) -> tuple[Float[Array, "b t d"], Inexact[Array, "b k"]]:
    """Runs h_t = a h_{t-1} + gain b x_t, and returns y_t = 2 Re(c h_t) + skip x_t, and the last h, complex64.

    S5 (arXiv 2208.04933) eq. 3 to 6; a and gain are those of `discretize`. y has the dtype of x, and is 0 at
    padding.

    Args:
      eigenvalues, step: those of the continuous state space, real parts below 0, and the time per token.
      c_reverse: weights of a second state, from the same recurrence run from the last token to the first.
      conj_sym: each state stands for itself and its conjugate; otherwise y_t = Re(c h_t) + skip x_t.
      initial_state: before the first token; None means zeros. The returned state is the forward one.
      segment_ids, implementation: see `diagonal_recurrence`.
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


def _complex_matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.einsum("btj,ij->bti", x, matrix.astype(jnp.complex64), precision=jax.lax.Precision.HIGHEST)
