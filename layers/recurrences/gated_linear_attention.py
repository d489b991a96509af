"""Linear attention with a decaying matrix state: RetNet, Mamba-2's SSD, simple GLA, GLA, HGRN2, RWKV-6."""
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
def gated_linear_attention(
    q: Float[Array, "b t n k"],
    k: Float[Array, "b t n k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    *,
    initial_state: Float[Array, "b h k v"] | Float[Array, "b e h k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    reverse: bool = False,
    scale: float | None = None,
    implementation: MatrixImplementation = "auto",
    axis_name: str | None = None,
    chunk_size: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"] | Float[Array, "b e h k v"]]:
    """Runs S_t = diag(exp log_decay_t) S_{t-1} + k_t v_t^T and returns o_t = scale S_t^T q_t, and the last state.

    GLA (arXiv 2312.06635) eq. 3; with a decay per head RetNet (2307.08621) and Mamba-2 (2405.21060); with
    k = 1 - exp(log_decay) HGRN2 (2404.07904). The state is float32; o has the dtype of v. A single token (t = 1)
    with the state of the previous ones is a decoding step.

    Args:
      q, k: value head i uses head i // (h / n).
      log_decay: natural log of the decay, <= 0, per head or per key channel; None decays nothing.
      initial_state: before the first token, float32; or one for each of e segments. None means zeros.
      segment_ids: 0 is padding, whose o is 0 and which leaves the state alone; see `run_segments`.
      reverse: run from the last token to the first.
      scale: factor of q; None means 1 / sqrt(k).
      implementation: "reference" runs token by token; "chunkwise" is for training, with the memory of one state
        per chunk; "pallas_tpu" and "pallas_gpu" (NVIDIA's) are kernels, whose states stay on the chip; "auto" is
        the kernel of the platform, and "chunkwise" where there is none, it lacks this case, or a mesh is in use,
        which is logged once. The compiler cannot split a kernel: with arrays on several devices call this inside
        jax.shard_map. For a single token, and on a CPU, "auto" is "reference" unless it is differentiated. Only
        "reference" and "chunkwise" have forward-mode and second derivatives.
      axis_name: inside `jax.shard_map`, the axis of the mesh over which t is sharded, in order: each shard then
        runs from the state that the earlier shards leave. The initial state enters the first shard and the last
        state leaves the last, both known on all shards.
      chunk_size: tokens per step of "chunkwise": it changes speed, not results. None means 32, or 16 with a decay
        per key channel.
      interpret: for the kernels, True or parameters of one of Pallas's interpreters: run on any machine, slowly.
    Raises:
      ValueError: heads do not fit those of v, chunk_size < 1, or, under `jax.debug_nans`, log_decay > 0.
      NotImplementedError: a state for each segment of rows that are sharded; or the implementation asked for lacks
        this case, and the message says why.
    """
    inputs = StepInputs(add_shared_axis(q, v, "q"), add_shared_axis(k, v, "k"), group_heads(v, k.shape[2]),
                        group_decays(log_decay, v, k.shape[2]))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return matrix_recurrence(inputs, initial_state, segment_ids, implementation, scale=scale, reverse=reverse,
                             chunk_size=chunk_size, axis_name=axis_name, interpret=interpret)


@typed
def rwkv6_recurrence(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, "b t h k"],
    bonus: Float[Array, "h k"],
    *,
    initial_state: Float[Array, "b h k v"] | Float[Array, "b e h k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    reverse: bool = False,
    scale: float | None = None,
    implementation: MatrixImplementation = "auto",
    axis_name: str | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"] | Float[Array, "b e h k v"]]:
    """Reads o_t = scale (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t, then S_t = diag(exp g_t) S_{t-1} + k_t v_t^T.

    RWKV-6 (arXiv 2404.05892) eq. 18. Arguments are those of `gated_linear_attention`, with keys per head.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact_q, exact_k, exact_v = (x.astype(jnp.float32) for x in (q, k, v))
    inputs = jax.tree.map(lambda x: x[:, :, :, None], StepInputs(q, k, exact_v, log_decay.astype(jnp.float32)))
    o, state = matrix_recurrence(
        inputs, initial_state, segment_ids, implementation, scale=scale, reverse=reverse, reads_before=True,
        axis_name=axis_name, interpret=interpret)
    own = jnp.sum(scale * exact_q * bonus.astype(jnp.float32) * exact_k, axis=-1, keepdims=True) * exact_v
    if segment_ids is not None:
        own = jnp.where((segment_ids != 0)[..., None, None], own, 0)
    return (o + own).astype(v.dtype), state
