"""The recurrence under all layers with a matrix state S [k, v]: what reads, decays and writes it.

  S_t = D_t S_{t-1} + k_t v_t^T                               gated linear attention
  S_t = D_t S_{t-1} + k_t (v_t - (D_t S_{t-1})^T a_t)^T       the gated delta rule: `a`
  S_t = D_t S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T         diagonal plus low rank: `a` and `b`
  o_t = S_t^T q_t

D_t = diag(exp log_decay_t), log_decay <= 0, per head or per key channel. Public functions with the papers' names
are in gated_linear_attention.py, gated_delta_rule.py and dplr_recurrence.py.

A segment that begins within a row does so with a decay of zero: what a state was no longer counts. Padding is
inert: it decays by nothing, writes nothing, and reads 0. What else segments mean: `segment_states.py`.
"""
import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from layers.arrays.dispatch import by_platform, kernel_modules, log_once
from layers.recurrences.context_parallel import Summary, varying_like
from layers.recurrences.log_decay import NOTHING_LEFT, check_log_decay
from layers.recurrences.matrix.chunkwise import chunkwise
from layers.recurrences.matrix.decays import exact_matmul
from layers.recurrences.matrix.reference import sequential
from layers.recurrences.matrix.tokens import Settings, Tokens
from layers.recurrences.segment_states import FIRST, PADDING, Shards, over_segments

MatrixImplementation = Literal["auto", "reference", "chunkwise", "pallas_tpu", "pallas_gpu"]
FORMS = {"reference": sequential, "chunkwise": chunkwise}
MOST_HEADS = 256  # more than there are tokens look like a mistaken axis
logger = logging.getLogger(__name__)


def matrix_recurrence(
    tokens: Tokens, initial_state: jax.Array | None, segment_ids: jax.Array | None,
    implementation: MatrixImplementation, *, scale: float = 1.0, reverse: bool = False, reads_before: bool = False,
    chunk_size: int | None = None, axis_name: str | None = None, interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns every scale * o_t [b, t, h, v], in v's dtype, and the last state.

    The state is float32 and shaped as the initial one. Heads h are those of the groups of `tokens` in order.

    Args:
      initial_state: [b, h, k, v] enters the first token, and further segments begin with zeros; the last state is
        that of the last segment. [b, n, h, k, v] holds one per segment, n at least the segments of any row, and so
        does the last state; this costs n times the work.
      segment_ids: [b, t]; None means one segment per row.
      reverse: run from the last token to the first, where the initial state enters.
      reads_before: o_t reads S_{t-1}, before it decays.
      chunk_size: tokens per step of "chunkwise", which changes its speed; None means as many as a CPU likes.
      axis_name: inside `jax.shard_map`, the axis of the mesh over which t is sharded, in order. The initial state
        is that of the first shard, and the last state that of the last, on all of them.
      interpret: for the kernels, True or parameters of one of Pallas's interpreters: run on any machine, slowly.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1")
    check_log_decay(tokens.log_decay)
    batch, length, groups, in_group = tokens.v.shape[:4]
    heads = groups * in_group
    if 1 < length < heads and heads > MOST_HEADS:
        log_once(logger, f"v has {heads} heads of {length} tokens: arrays are time first, [b, t, heads, width]; "
                 "if these are [b, heads, t, width], swap axes 1 and 2", logging.WARNING)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, tokens.k.shape[-1], tokens.v.shape[-1]), jnp.float32)
    settings = Settings(scale, reads_before, chunk_size, interpret)
    run = functools.partial(_run, implementation, settings)
    grouped = initial_state.reshape(
        *initial_state.shape[:-3], groups, in_group, *initial_state.shape[-2:]).astype(jnp.float32)
    grouped = varying_like(grouped, tokens.v)
    shards = None
    if axis_name is not None:
        shards = Shards(axis_name, functools.partial(_summary, implementation, interpret), _apply)
    o, last = over_segments(
        run, tokens, grouped, segment_ids, has_one_each=initial_state.ndim == 5, reverse=reverse, shards=shards)
    return o.reshape(batch, length, heads, -1), last.reshape(initial_state.shape)


def _run(
    implementation: MatrixImplementation, settings: Settings, tokens: Tokens, state: jax.Array,
    marks: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    inert = _inert(settings.reads_before, tokens, marks)
    if implementation in FORMS:
        return FORMS[implementation](inert, state, settings)
    if implementation != "auto":
        return _by_platform(settings, inert, state, implementation=implementation)
    log_once(logger, "matrix recurrences run as the kernel of a TPU or GPU; else by chunks where differentiated, "
             "and by tokens where not")
    return _auto(settings, inert, state) if tokens.v.shape[1] > 1 else sequential(inert, state, settings)


def _inert(reads_before: bool, tokens: Tokens, marks: jax.Array | None) -> Tokens:
    """Tokens of which padding does nothing, and the first of a segment leaves nothing of the state before."""
    if marks is None:
        return tokens
    marks = marks[..., None, None, None]

    def where(mask, x, otherwise):
        return jnp.where(mask, x, jnp.asarray(otherwise, x.dtype))

    inert = jax.tree.map(lambda x: where(marks != PADDING, x, 0), tokens)
    inert = inert._replace(log_decay=where(marks != FIRST, inert.log_decay, NOTHING_LEFT))
    # Nor may what reads the state before its decay see another segment's.
    for name in ["a"] * (inert.b is not None) + ["q"] * reads_before:
        inert = inert._replace(**{name: where(marks != FIRST, getattr(inert, name), 0)})
    return inert


def _summary(
    implementation: MatrixImplementation, interpret: Any, tokens: Tokens, marks: jax.Array | None
) -> Summary:
    """Of a shard: the state is only decayed, or multiplied by a matrix [k, k]."""
    run = functools.partial(_run, implementation, Settings(interpret=interpret))
    batch, _, groups, in_group, value_width = tokens.v.shape
    key_width = tokens.k.shape[-1]
    own = varying_like(jnp.zeros((batch, groups, in_group, key_width, value_width), jnp.float32), tokens.v)
    if tokens.a is None:
        log_decay = _inert(False, tokens, marks).log_decay
        transition = jnp.exp(jnp.sum(log_decay, axis=1))[..., None]
        return Summary(transition, run(tokens, own, marks)[1])
    # A value of zeros writes nothing: what enters with it is seen to leave as it is changed on the way.
    unwritten = jnp.zeros((*tokens.v.shape[:-1], key_width), tokens.v.dtype)
    tokens = tokens._replace(v=jnp.concatenate([tokens.v, unwritten], axis=-1))
    unit = jnp.broadcast_to(jnp.eye(key_width), (*own.shape[:-1], key_width))
    last = run(tokens, jnp.concatenate([own, unit], axis=-1), marks)[1]
    return Summary(last[..., value_width:], last[..., :value_width])


def _apply(transition: jax.Array, state: jax.Array) -> jax.Array:
    return transition * state if transition.shape[-1] == 1 else exact_matmul(transition, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel(
    module: ModuleType, settings: Settings, tokens: Tokens, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return module.forward(settings, tokens, state, keep_states=False)[:2]


def _kernel_fwd(module, settings, tokens, state):
    o, last, states = module.forward(settings, tokens, state, keep_states=True)
    return (o, last), (tokens, states)


def _kernel_bwd(module, settings, residuals, cotangents):
    return module.backward(settings, *residuals, *cotangents)


_kernel.defvjp(_kernel_fwd, _kernel_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _auto(settings: Settings, tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _by_platform(settings, tokens, state, cpu=functools.partial(sequential, settings=settings))


def _auto_fwd(settings, tokens, state):
    return jax.vjp(functools.partial(_by_platform, settings), tokens, state)


def _auto_bwd(_, pull_back, cotangents):
    return pull_back(cotangents)


_auto.defvjp(_auto_fwd, _auto_bwd)


def _by_platform(
    settings: Settings, tokens: Tokens, state: jax.Array, *, implementation: MatrixImplementation = "auto",
    **others: Callable,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel of the platform, or "chunkwise" where there is none, or `others` by platform."""
    modules = kernel_modules("recurrences.matrix", implementation)
    kernels = {platform: functools.partial(_kernel, module, settings) for platform, module in modules.items()}
    return by_platform(
        "matrix_recurrence", kernels | others | {"default": functools.partial(chunkwise, settings=settings)},
        tokens, state, reasons={platform: module.unsupported(tokens) for platform, module in modules.items()},
        fallback="chunkwise", implementation=implementation)


def per_group(x: jax.Array, v: jax.Array, name: str) -> jax.Array:
    """Heads of q or k [b, t, g, k], each for the value heads it serves: [b, t, g, 1, k]."""
    if v.shape[2] % x.shape[2]:
        raise ValueError(f"{name} has {x.shape[2]} heads, which must divide the {v.shape[2]} of v; arrays are "
                         "time first, [b, t, heads, width]")
    return x[:, :, :, None]


def per_head(x: jax.Array, num_groups: int) -> jax.Array:
    """[b, t, h, width] -> [b, t, g, h / g, width]."""
    return x.reshape(*x.shape[:2], num_groups, -1, x.shape[-1])


def decay_per_head(log_decay: jax.Array | None, v: jax.Array, num_groups: int) -> jax.Array:
    """[b, t, h] or [b, t, h, k] -> [b, t, g, h / g, 1 or k] float32; zeros for None."""
    if log_decay is None:
        log_decay = jnp.zeros(v.shape[:3], jnp.float32)
    log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
    return per_head(log_decay.astype(jnp.float32), num_groups)
