"""The recurrence of RWKV-7: a matrix state whose transition is diagonal plus low rank."""
from typing import Any

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.recurrences.matrix import MatrixImplementation, StepInputs, matrix_recurrence


@typed
def dplr_recurrence(
    r: Float[Array, "b t h k"],
    w: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    a: Float[Array, "b t h k"],
    b: Float[Array, "b t h k"],
    *,
    initial_state: Float[Array, "b h k v"] | Float[Array, "b e h k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    implementation: MatrixImplementation = "auto",
    axis_name: str | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"] | Float[Array, "b e h k v"]]:
    """Runs S_t = diag(exp w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T; returns o_t = scale S_t^T r_t, and S.

    RWKV-7 (arXiv 2503.14456) eq. 17, with a = -kappa and b = kappa * gate. The state is float32; o has v's dtype.

    Args:
      w: natural log of the decay, <= 0.
      initial_state, segment_ids, reverse, implementation, axis_name, interpret: see `gated_linear_attention`.
    """
    inputs = jax.tree.map(lambda x: x[:, :, :, None], StepInputs(r, k, v, w.astype(jnp.float32), a, b))
    return matrix_recurrence(inputs, initial_state, segment_ids, implementation, scale=scale, reverse=reverse,
                             axis_name=axis_name, interpret=interpret)
