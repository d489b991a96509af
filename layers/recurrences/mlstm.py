"""The matrix memory of xLSTM: linear attention with an exponential input gate, kept in range by a running maximum.

  m_t = max(log f_t + m_{t-1}, i_t)        f' = exp(log f_t + m_{t-1} - m_t),    i' = exp(i_t - m_t)
  C_t = f' C_{t-1} + i' k_t v_t^T          n_t = f' n_{t-1} + i' k_t
  h_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + epsilon)

Once m is known this is gated linear attention: f' is a decay, i' scales the value, and n is the state of one
further value, 1. Both exponents are parts of one number, i_t - log f_t - m_{t-1}: its positive part decays the
state and its negative part the value, so that neither grows, however m is rounded.
"""
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.recurrences.gated_linear_attention import gated_linear_attention
from layers.recurrences.linear_attention import append_ones, join_state, split_state
from layers.recurrences.matrix import MatrixImplementation
from layers.recurrences.running_max import fading_max_before

InputActivation = Literal["exp", "sigmoid"]
EPSILON = 1e-6  # added to the normaliser


class MLSTMMemory(NamedTuple):
    """Memory of the tokens so far, in units of exp(m); a further axis e after b holds one per segment."""

    c: jax.Array  # [b, h, k, v] float32
    n: jax.Array  # [b, h, k] float32
    m: jax.Array  # [b, h] float32


@typed
def mlstm(
    q: Float[Array, "b t n k"],
    k: Float[Array, "b t n k"],
    v: Float[Array, "b t h v"],
    input_gate: Float[Array, "b t h"],
    forget_gate: Float[Array, "b t h"],
    *,
    input_activation: InputActivation = "exp",
    initial_state: MLSTMMemory | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    implementation: MatrixImplementation = "auto",
) -> tuple[Float[Array, "b t h v"], MLSTMMemory]:
    """Returns every h_t, in the dtype of v, and the memory after the last token.

    xLSTM (arXiv 2405.04517) eq. 19 to 27, and with the sigmoid of arXiv 2503.14376.

    Args:
      input_gate, forget_gate: logits, before their activations; that of the forget gate is a sigmoid.
      input_activation: activation of the input gate. With "sigmoid" nothing can grow: m stays 0 and the
        normaliser is max(|n . q|, 1).
      initial_state: before the first token, or one for each of e segments. None means C = 0, n = 0, m = 0, and so
        does the start of a segment; the paper's parallel form begins with m = -infinity, and so without a floor.
      q, k, segment_ids, scale, implementation: see `gated_linear_attention`.
    """
    if initial_state is None:
        batch, num_heads = v.shape[0], v.shape[2]
        initial_state = empty_memory(batch, num_heads, k.shape[3], v.shape[3])
    log_forget = jax.nn.log_sigmoid(forget_gate.astype(jnp.float32))
    exact_input = input_gate.astype(jnp.float32)
    if input_activation == "exp":
        before, last_m = fading_max_before(exact_input, log_forget, initial_state.m, segment_ids=segment_ids)
        surplus = exact_input - log_forget - before
        log_decay, log_written = -jnp.maximum(surplus, 0), jnp.minimum(surplus, 0)
        m = before + log_forget - log_decay
    else:
        log_decay, log_written = log_forget, jax.nn.log_sigmoid(exact_input)
        m, last_m = jnp.zeros_like(log_forget), initial_state.m

    written = append_ones(v) * jnp.exp(log_written)[..., None]
    o, last = gated_linear_attention(
        q, k, written, log_decay, initial_state=join_state(initial_state.c, initial_state.n),
        segment_ids=segment_ids, scale=scale, implementation=implementation)
    h = _normalize(o[..., :-1], o[..., -1], m)
    return h.astype(v.dtype), MLSTMMemory(*split_state(last), last_m)


def empty_memory(batch: int, num_heads: int, key_width: int, value_width: int) -> MLSTMMemory:
    """Returns the memory before the first token."""
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    return MLSTMMemory(
        zeros((batch, num_heads, key_width, value_width)), zeros((batch, num_heads, key_width)),
        zeros((batch, num_heads)))


def _normalize(numerator: jax.Array, weight: jax.Array, m: jax.Array) -> jax.Array:
    """Divides by max(|weight|, exp(-m)) + epsilon, both scaled by exp(min(m, 0)) to keep exp(-m) finite."""
    shift = jax.lax.stop_gradient(jnp.minimum(m, 0))  # the quotient does not depend on it
    unit = jnp.exp(shift)
    denominator = jnp.maximum(jnp.abs(weight) * unit, jnp.exp(shift - m)) + EPSILON * unit
    return numerator * (unit / denominator)[..., None]
