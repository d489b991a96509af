"""The delta rule with a decaying matrix state: DeltaNet, Gated DeltaNet, KDA, Comba, gated DeltaProduct, GDN-2."""
from typing import Any

import jax
import jax.numpy as jnp

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
def gated_delta_rule(
    q: Float[Array, "b t n k"],
    k: Float[Array, "b t n k"],
    v: Float[Array, "b t h v"],
    beta: Float[Array, "b t h"] | None = None,
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    *,
    read_key: Float[Array, "b t n k"] | None = None,
    erase: Float[Array, "b t h k"] | None = None,
    write: Float[Array, "b t h v"] | None = None,
    initial_state: Float[Array, "b h k v"] | Float[Array, "b e h k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    reverse: bool = False,
    scale: float | None = None,
    implementation: MatrixImplementation = "auto",
    axis_name: str | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"] | Float[Array, "b e h k v"]]:
    """Decays the state, then corrects its answer to a key: S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T.

    S' = diag(exp log_decay_t) S_{t-1}, and o_t = scale S_t^T q_t. DeltaNet (arXiv 2406.06484); with a decay per
    head Gated DeltaNet (2412.06464) eq. 10, per key channel KDA (2510.26692). Keys should have norm 1 at most and
    beta be in [0, 2], or the state grows. The state is float32; o has the dtype of v. A single token (t = 1) with
    the state of the previous ones is a decoding step.

    Args:
      q, k, read_key: value head i uses head i // (h / n).
      beta: share of the answer that is replaced; None means 1.
      log_decay: natural log of the decay, <= 0; None decays nothing.
      read_key: the key whose answer is subtracted, in place of k (Comba, arXiv 2506.02475).
      erase, write: gates per channel of the subtracted key and of the value, in place of beta (GDN-2).
      initial_state, segment_ids, reverse, scale, implementation, axis_name, interpret: see
        `gated_linear_attention`.
    Raises:
      ValueError: heads or the shape of log_decay do not fit those of v, or beta is given besides erase or write.
    """
    if beta is not None and (erase is not None or write is not None):
        raise ValueError("beta stands for erase and write both; give beta, or those two")
    num_key_heads = k.shape[2]

    def gated(gate: jax.Array | None, x: jax.Array) -> jax.Array:
        return x if gate is None else group_heads(gate.astype(jnp.float32), num_key_heads) * x.astype(jnp.float32)

    inputs = StepInputs(
        add_shared_axis(q, v, "q"), gated(None if beta is None else beta[..., None], add_shared_axis(k, v, "k")),
        gated(write, group_heads(v, num_key_heads)), group_decays(log_decay, v, num_key_heads),
        a=gated(erase, add_shared_axis(k if read_key is None else read_key, v, "read_key")))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, state = matrix_recurrence(
        inputs, initial_state, segment_ids, implementation, scale=scale, reverse=reverse, axis_name=axis_name,
        interpret=interpret)
    return o.astype(v.dtype), state


@typed
def gated_delta_product(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t r h k"],
    v: Float[Array, "b t r h v"],
    beta: Float[Array, "b t r h"],
    log_decay: Float[Array, "b t h"] | None = None,
    *,
    initial_state: Float[Array, "b h k v"] | Float[Array, "b e h k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    implementation: MatrixImplementation = "auto",
    axis_name: str | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"] | Float[Array, "b e h k v"]]:
    """Decays once, then takes r steps of the delta rule per token (arXiv 2502.10297); reads after the last.

    Arguments are those of `gated_delta_rule`, with r keys, values and betas per token.
    """
    batch, length, steps, num_heads = beta.shape

    def flatten_steps(x):
        return x.reshape(batch, length * steps, *x.shape[3:])

    decay = jnp.zeros((batch, length, steps, num_heads), jnp.float32)
    if log_decay is not None:
        decay = decay.at[:, :, 0].set(log_decay)
    queries = jnp.repeat(q, steps, axis=1)
    segments = None if segment_ids is None else jnp.repeat(segment_ids, steps, axis=1)
    o, state = gated_delta_rule(
        queries, flatten_steps(k), flatten_steps(v), flatten_steps(beta), flatten_steps(decay),
        initial_state=initial_state, segment_ids=segments, scale=scale, implementation=implementation,
        axis_name=axis_name, interpret=interpret)
    return o[:, steps - 1 :: steps], state
