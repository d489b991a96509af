"""The recurrence below all layers with a matrix state S [k, v].

  S_t = D_t S_{t-1} + k_t v_t^T                               gated linear attention
  S_t = D_t S_{t-1} + k_t (v_t - (D_t S_{t-1})^T a_t)^T       the gated delta rule: `a`
  S_t = D_t S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T         diagonal plus low rank: `a` and `b`
  o_t = S_t^T q_t

D_t = diag(exp log_decay_t), log_decay <= 0, per head or per key channel. Public functions with the papers' names
are in gated_linear_attention.py, gated_delta_rule.py and dplr_recurrence.py.

The first token of a later segment has decay 0, which discards the previous state. Padding is inert: it decays by
nothing, writes nothing, and reads 0. The rest of segments' meaning is in `segment_states.py`.
"""
import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from layers.arrays.dispatch import by_platform, kernel_modules, log_once
from layers.recurrences.context_parallel import Summary, varying_like
from layers.recurrences.log_decay import NOTHING_LEFT, check_log_decay
from layers.recurrences.matrix.chunkwise import chunkwise
from layers.recurrences.matrix.decays import exact_matmul
from layers.recurrences.matrix.reference import sequential
from layers.recurrences.matrix.step_inputs import MatrixCall, StepInputs
from layers.recurrences.segment_states import FIRST, PADDING, Shards, run_segments

MatrixImplementation = Literal["auto", "reference", "chunkwise", "pallas_tpu", "pallas_gpu"]
Run = Callable[[StepInputs, jax.Array], tuple[jax.Array, jax.Array]]  # of an entering state; (o, last state)
FORMS = {"reference": sequential, "chunkwise": chunkwise}
MOST_HEADS = 256  # more heads than this and than tokens look like a mistaken axis
logger = logging.getLogger(__name__)


def matrix_recurrence(
    inputs: StepInputs, initial_state: jax.Array | None, segment_ids: jax.Array | None,
    implementation: MatrixImplementation, *, scale: float = 1.0, reverse: bool = False, reads_before: bool = False,
    chunk_size: int | None = None, axis_name: str | None = None, interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns every scale * o_t [b, t, h, v], in v's dtype, and the last state.

    The state is float32 and shaped as the initial one. Heads h are the value heads of `inputs` in order.

    Args:
      initial_state: [b, h, k, v] enters the first token, and further segments begin with zeros; the last state is
        that of the last segment. [b, e, h, k, v] holds one per segment, e at least the segments of any row, and so
        does the last state; this costs e times the work.
      segment_ids: [b, t]; None means one segment per row.
      reverse: run from the last token to the first, where the initial state enters.
      reads_before: o_t reads S_{t-1}, before it decays.
      chunk_size: tokens per step of "chunkwise", which changes its speed; None picks a size tuned for CPU.
      axis_name: inside `jax.shard_map`, the axis of the mesh over which t is sharded, in order. The initial state
        is that of the first shard, and the last state that of the last, on all of them.
      interpret: for the kernels, True or parameters of one of Pallas's interpreters: run on any machine, slowly.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1")
    check_log_decay(inputs.log_decay)
    batch, length, num_key_heads, repeats = inputs.v.shape[:4]
    heads = num_key_heads * repeats
    if 1 < length < heads and heads > MOST_HEADS:
        log_once(logger, f"v has {heads} heads of {length} tokens: arrays are time first, [b, t, heads, width]; "
                 "if these are [b, heads, t, width], swap axes 1 and 2", logging.WARNING)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, inputs.k.shape[-1], inputs.v.shape[-1]), jnp.float32)
    state = initial_state.reshape(
        *initial_state.shape[:-3], num_key_heads, repeats, *initial_state.shape[-2:]).astype(jnp.float32)
    state = varying_like(state, inputs.v)
    run = _choose(implementation, MatrixCall(scale, reads_before, chunk_size, interpret), inputs)
    shards = None
    if axis_name is not None:
        summarize = functools.partial(_summarize, implementation, MatrixCall(interpret=interpret))
        shards = Shards(axis_name, summarize, _apply)
    o, last = run_segments(
        run, inputs, state, segment_ids, prepare=functools.partial(_mark_inputs, reads_before),
        has_state_per_segment=initial_state.ndim == 5, reverse=reverse, shards=shards)
    return o.reshape(batch, length, heads, -1), last.reshape(initial_state.shape)


def _choose(implementation: MatrixImplementation, call: MatrixCall, inputs: StepInputs) -> Run:
    """Returns the function that an implementation stands for, for inputs of these shapes and dtypes."""
    if implementation == "auto":
        log_once(logger, "matrix recurrences run as the kernel of a TPU or GPU; else by chunks where "
                 "differentiated, and by tokens where not")
        if inputs.v.shape[1] <= 1:
            return functools.partial(sequential, call)
    if implementation in FORMS:
        return functools.partial(FORMS[implementation], call)
    modules = kernel_modules("recurrences.matrix", implementation)
    run = {platform: functools.partial(module.run, call) for platform, module in modules.items()}
    return functools.partial(
        by_platform, "matrix_recurrence", run | {"default": functools.partial(_by_tokens_or_chunks, call)},
        reasons={platform: module.unsupported(inputs) for platform, module in modules.items()},
        fallback="chunkwise", implementation=implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_tokens_or_chunks(call: MatrixCall, inputs: StepInputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs without a kernel: by tokens on a CPU, which is fastest there unless it is differentiated."""
    return jax.lax.platform_dependent(
        inputs, state, cpu=functools.partial(sequential, call), default=functools.partial(chunkwise, call))


def _by_tokens_or_chunks_fwd(call, inputs, state):
    return jax.vjp(functools.partial(chunkwise, call), inputs, state)


def _by_tokens_or_chunks_bwd(_, pull_back, cotangents):
    return pull_back(cotangents)


_by_tokens_or_chunks.defvjp(_by_tokens_or_chunks_fwd, _by_tokens_or_chunks_bwd)


def _mark_inputs(reads_before: bool, inputs: StepInputs, marks: jax.Array | None) -> StepInputs:
    """Makes padding inert, and the first token of a segment discard the previous state."""
    if marks is None:
        return inputs
    marks = marks[..., None, None, None]

    def where(mask, x, otherwise):
        return jnp.where(mask, x, jnp.asarray(otherwise, x.dtype))

    inert = jax.tree.map(lambda x: where(marks != PADDING, x, 0), inputs)
    inert = inert._replace(log_decay=where(marks != FIRST, inert.log_decay, NOTHING_LEFT))
    # Arrays that read the state before its decay must not see another segment's either.
    for name in ["a"] * (inert.b is not None) + ["q"] * reads_before:
        inert = inert._replace(**{name: where(marks != FIRST, getattr(inert, name), 0)})
    return inert


def _summarize(implementation: MatrixImplementation, call: MatrixCall, inputs: StepInputs) -> Summary:
    """Returns what a shard does to a state: decay it, or multiply it by a matrix [k, k], and add its own."""
    batch, _, num_key_heads, repeats, value_width = inputs.v.shape
    key_width = inputs.k.shape[-1]
    own = varying_like(
        jnp.zeros((batch, num_key_heads, repeats, key_width, value_width), jnp.float32), inputs.v)
    if inputs.a is None:
        transition = jnp.exp(jnp.sum(inputs.log_decay, axis=1))[..., None]
        return Summary(transition, _choose(implementation, call, inputs)(inputs, own)[1])
    # Values of zeros write nothing: the identity that enters beside them leaves as the transition.
    unwritten = jnp.zeros((*inputs.v.shape[:-1], key_width), inputs.v.dtype)
    inputs = inputs._replace(v=jnp.concatenate([inputs.v, unwritten], axis=-1))
    identity = jnp.broadcast_to(jnp.eye(key_width), (*own.shape[:-1], key_width))
    last = _choose(implementation, call, inputs)(inputs, jnp.concatenate([own, identity], axis=-1))[1]
    return Summary(last[..., value_width:], last[..., :value_width])


def _apply(transition: jax.Array, state: jax.Array) -> jax.Array:
    return transition * state if transition.shape[-1] == 1 else exact_matmul(transition, state)
