"""State-space duality (SSD), the recurrence of Mamba-2, under the names of its paper."""
from typing import Any

from layers.array_types import Array, Float, Int, typed
from layers.recurrences.matrix import (
    MatrixImplementation,
    StepInputs,
    add_shared_axis,
    group_decays,
    group_heads,
    matrix_recurrence,
)


@typed
def ssd_scan(
    x: Float[Array, "b t h v"],
    log_decay: Float[Array, "b t h"],
    b: Float[Array, "b t n k"],
    c: Float[Array, "b t n k"],
    *,
    initial_state: Float[Array, "b h k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: MatrixImplementation = "auto",
    chunk_size: int = 64,
    interpret: Any = False,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Runs S_t = exp(log_decay_t) S_{t-1} + b_t x_t^T; returns every y_t = S_t^T c_t, in the dtype of x, and S.

    Transformers are SSMs (arXiv 2405.21060), eq. 16 and listing 1, with Mamba's dt already multiplied in: x is
    dt * x and log_decay is dt * A. It is `gated_linear_attention` with queries c, keys b and values x.

    Args:
      log_decay: natural log of the decay, <= 0.
      b, c: keys and queries; value head i uses head i // (h / n).
      initial_state, segment_ids, implementation, chunk_size, interpret: see `gated_linear_attention`.
    Raises:
      ValueError: the heads of b and c do not divide those of x, or chunk_size < 1.
    """
    inputs = StepInputs(add_shared_axis(c, x, "c"), add_shared_axis(b, x, "b"), group_heads(x, b.shape[2]),
                        group_decays(log_decay, x, b.shape[2]))
    return matrix_recurrence(inputs, initial_state, segment_ids, implementation, chunk_size=chunk_size,
                             interpret=interpret)
