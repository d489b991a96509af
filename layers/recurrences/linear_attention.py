"""Linear attention without decay, normalised by the sum of its weights; one recurrence computes values and sum."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.recurrences.gated_linear_attention import gated_linear_attention
from layers.recurrences.matrix import MatrixImplementation

EPSILON = 1e-10  # added to the sum of weights


class LinearAttentionState(NamedTuple):
    """Sums over the tokens so far; a further axis e after b holds one for each segment."""

    kv: jax.Array  # [b, h, k, v] float32: sum of k v^T
    k: jax.Array   # [b, h, k] float32: sum of k


@typed
def linear_attention(
    q: Float[Array, "b t n k"],
    k: Float[Array, "b t n k"],
    v: Float[Array, "b t h v"],
    *,
    normalize: bool,
    initial_state: LinearAttentionState | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    reverse: bool = False,
    scale: float | None = None,
    implementation: MatrixImplementation = "auto",
) -> tuple[Float[Array, "b t h v"], LinearAttentionState]:
    """Runs S_t = S_{t-1} + k_t v_t^T and z_t = z_{t-1} + k_t, and returns o_t = S_t^T q_t, and the last S and z.

    Linear transformers (arXiv 2006.16236) eq. 16 to 20, with the feature map left to the caller.

    Args:
      normalize: o_t = S_t^T q_t / (z_t . q_t + 1e-10), for positive q and k; otherwise o_t = scale S_t^T q_t.
      initial_state: before the first token; None means zeros.
      q, k, segment_ids, reverse, scale, implementation: see `gated_linear_attention`.
    """
    o, state = gated_linear_attention(
        q, k, append_ones(v), initial_state=None if initial_state is None else join_state(*initial_state),
        segment_ids=segment_ids, reverse=reverse, scale=scale, implementation=implementation)
    weighted, weight = o[..., :-1], o[..., -1:]
    if normalize:
        weighted = weighted / (weight + EPSILON)
    return weighted.astype(v.dtype), LinearAttentionState(*split_state(state))


def append_ones(v: jax.Array) -> jax.Array:
    """Appends a channel of ones to values [..., v]; its state is the sum of keys. Float32."""
    return jnp.concatenate([v.astype(jnp.float32), jnp.ones((*v.shape[:-1], 1), jnp.float32)], axis=-1)


def join_state(kv: jax.Array, k: jax.Array) -> jax.Array:
    """Joins [..., k, v] and [..., k] to [..., k, v + 1], the state that `append_ones` leads to."""
    return jnp.concatenate([kv, k[..., None]], axis=-1).astype(jnp.float32)


def split_state(state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits [..., k, v + 1] into [..., k, v] and [..., k]."""
    return state[..., :-1], state[..., -1]
