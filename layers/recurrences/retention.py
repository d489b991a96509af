"""Retention: linear attention whose heads forget at fixed rates."""
import jax.numpy as jnp
import numpy as np

from layers.array_types import Array, Float, Int, typed
from layers.recurrences.gated_linear_attention import gated_linear_attention
from layers.recurrences.matrix import MatrixImplementation


@typed
def retention(
    q: Float[Array, "b t n k"],
    k: Float[Array, "b t n k"],
    v: Float[Array, "b t h v"],
    *,
    initial_state: Float[Array, "b h k v"] | Float[Array, "b e h k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    reverse: bool = False,
    scale: float | None = None,
    implementation: MatrixImplementation = "auto",
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"] | Float[Array, "b e h k v"]]:
    """Runs S_t = gamma S_{t-1} + k_t v_t^T and returns o_t = scale S_t^T q_t, and the last state.

    RetNet (arXiv 2307.08621) eq. 6 and 8, with the gamma of `retention_log_decay`. Rotation of q and k, and the
    norm over heads, are the caller's. Other arguments are those of `gated_linear_attention`.
    """
    log_decay = jnp.broadcast_to(retention_log_decay(v.shape[2]), v.shape[:3])
    return gated_linear_attention(
        q, k, v, log_decay, initial_state=initial_state, segment_ids=segment_ids, reverse=reverse, scale=scale,
        implementation=implementation)


def retention_log_decay(num_heads: int) -> np.ndarray:
    """Returns log(1 - 2^(-5 - head)), [h] float32: memories of 32, 64, 128, ... tokens."""
    # log1p, as 1 - 2^-30 rounds to 1: a head that never forgets.
    return np.log1p(-(2.0 ** (-5.0 - np.arange(num_heads)))).astype(np.float32)
