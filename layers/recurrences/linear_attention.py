"""Linear attention without decay, normalised by the sum of its weights: one recurrence for values and sum."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.recurrences.gated_linear_attention import gated_linear_attention
from layers.recurrences.matrix import MatrixImplementation

EPSILON = 1e-10  # added to the sum of weights


class LinearAttentionState(NamedTuple):
    """What the tokens so far have written; a further axis n after b holds one for each segment."""

    kv: jax.Array  # [b, h, k, v] float32: sum of k v^T
    k: jax.Array   # [b, h, k] float32: sum of k


@typed
def linear_attention(
    q: Float[Array, "b t g k"],
    k: Float[Array, "b t g k"],
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
      normalize: o_t = S_t^T q_t / (z_t . q_t + 1e-10), for positive q and k; else o_t = scale S_t^T q_t.
      initial_state: before the first token; None means zeros.
      q, k, segment_ids, reverse, scale, implementation: as of `gated_linear_attention`.
    """
    o, state = gated_linear_attention(
        q, k, with_ones(v), initial_state=None if initial_state is None else join_state(*initial_state),
        segment_ids=segment_ids, reverse=reverse, scale=scale, implementation=implementation)
    weighted, weight = o[..., :-1], o[..., -1:]
    if normalize:
        weighted = weighted / (weight + EPSILON)
    return weighted.astype(v.dtype), LinearAttentionState(*split_state(state))


def with_ones(v: jax.Array) -> jax.Array:
    """Values [..., v] with a channel of ones, whose state is the sum of keys: [..., v + 1] float32."""
    return jnp.concatenate([v.astype(jnp.float32), jnp.ones((*v.shape[:-1], 1), jnp.float32)], axis=-1)


def join_state(kv: jax.Array, k: jax.Array) -> jax.Array:
    """[..., k, v] and [..., k] -> [..., k, v + 1], the state that `with_ones` leads to."""
    return jnp.concatenate([kv, k[..., None]], axis=-1).astype(jnp.float32)


def split_state(state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., k, v + 1] -> [..., k, v] and [..., k]."""
    return state[..., :-1], state[..., -1]
