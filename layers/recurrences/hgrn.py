"""HGRN: a vector state whose input gate is one minus its forget gate."""
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.recurrences.diagonal import DiagonalImplementation, diagonal_recurrence


@typed
def hgrn(
    i: Float[Array, "b t d"],
    log_decay: Float[Array, "b t d"],
    *,
    initial_state: Float[Array, "b d"] | Float[Array, "b e d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: DiagonalImplementation = "auto",
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"] | Float[Array, "b e d"]]:
    """Runs h_t = f_t h_{t-1} + (1 - f_t) silu(i_t) with f = exp(log_decay); returns every h_t, and the last.

    HGRN (arXiv 2311.04823) eq. 1 to 4 with real f. Arguments are those of `diagonal_recurrence`.
    """
    exact_decay = log_decay.astype(jnp.float32)
    # expm1: where f rounds to 1, nothing would ever enter.
    x = jax.nn.silu(i.astype(jnp.float32)) * -jnp.expm1(exact_decay)
    h, last = diagonal_recurrence(
        x, log_a=exact_decay, initial_state=initial_state, segment_ids=segment_ids, implementation=implementation)
    return h.astype(i.dtype), last
