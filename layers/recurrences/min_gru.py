"""minGRU: a GRU whose gates read the input alone, so that its state is a diagonal recurrence."""
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.recurrences.diagonal import DiagonalImplementation, diagonal_recurrence


@typed
def min_gru(
    hidden: Float[Array, "b t d"],
    gate: Float[Array, "b t d"],
    *,
    initial_state: Float[Array, "b d"] | Float[Array, "b e d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: DiagonalImplementation = "auto",
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"] | Float[Array, "b e d"]]:
    """Runs h_t = (1 - z_t) h_{t-1} + z_t g(hidden_t) with z_t = sigmoid(gate_t); returns every h_t, and the last.

    Were RNNs all we needed? (arXiv 2410.01201) appendix B: g(x) = x + 1/2 for x >= 0 and sigmoid(x) below. It is
    positive, and so is every state. Arguments are those of `diagonal_recurrence`.
    """
    exact_hidden, exact_gate = hidden.astype(jnp.float32), gate.astype(jnp.float32)
    candidate = jnp.where(exact_hidden >= 0, exact_hidden + 0.5, jax.nn.sigmoid(exact_hidden))
    h, last = diagonal_recurrence(
        jax.nn.sigmoid(exact_gate) * candidate, log_a=jax.nn.log_sigmoid(-exact_gate), initial_state=initial_state,
        segment_ids=segment_ids, implementation=implementation)
    return h.astype(hidden.dtype), last
