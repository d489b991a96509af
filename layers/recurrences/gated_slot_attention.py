"""Gated slot attention: a fixed number of slots, each with a fading key and value, read by a softmax.

  K_t = K_{t-1} diag(exp g_t) + k_t s_t^T          [k, slots]
  V_t = diag(exp g_t) V_{t-1} + s_t v_t^T          [slots, v]
  o_t = V_t^T softmax(scale K_t^T q_t)

It is two passes of gated linear attention. V decays by key channel, and its keys are s. K decays by value channel:
slot by slot, it has a decay per head and values of width 1.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from layers.array_types import Array, Float, Int, typed
from layers.recurrences.gated_linear_attention import gated_linear_attention
from layers.recurrences.matrix import MatrixImplementation


class SlotState(NamedTuple):
    """Contents of the slots; a further axis e after b holds one for each segment."""

    keys: jax.Array    # [b, h, k, slots] float32
    values: jax.Array  # [b, h, slots, v] float32


@typed
def gated_slot_attention(
    q: Float[Array, "b t n k"],
    k: Float[Array, "b t n k"],
    v: Float[Array, "b t h v"],
    s: Float[Array, "b t h slots"],
    log_decay: Float[Array, "b t h slots"],
    *,
    initial_state: SlotState | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    implementation: MatrixImplementation = "auto",
) -> tuple[Float[Array, "b t h v"], SlotState]:
    """Returns every o_t, in the dtype of v, and the slots after the last token.

    GSA (arXiv 2409.07146) eq. 8 and 9.

    Args:
      s: share of a token that each slot takes up; 1 - exp(log_decay) in the paper.
      log_decay: natural log of the share that each slot keeps, <= 0.
      initial_state: before the first token, or one for each of e segments. None means empty slots.
      q, k, segment_ids, scale, implementation: see `gated_linear_attention`; the scale is inside the softmax.
    """
    num_slots = s.shape[3]
    keys = values = None
    if initial_state is not None:
        keys, values = rearrange(initial_state.keys, "... h k m -> ... (h m) k 1"), initial_state.values

    def one_head_per_slot(x: jax.Array) -> jax.Array:
        return rearrange(x.astype(jnp.float32), "b t h m -> b t (h m)")

    logits, keys = gated_linear_attention(
        q, k, one_head_per_slot(s)[..., None], one_head_per_slot(log_decay), initial_state=keys,
        segment_ids=segment_ids, scale=scale, implementation=implementation)
    weights = jax.nn.softmax(rearrange(logits, "b t (h m) 1 -> b t h m", m=num_slots), axis=-1)
    o, values = gated_linear_attention(
        weights, s, v, log_decay, initial_state=values, segment_ids=segment_ids, scale=1.0,
        implementation=implementation)
    return o, SlotState(rearrange(keys, "... (h m) k 1 -> ... h k m", m=num_slots), values)
