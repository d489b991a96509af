"""A vector state that decays by channel: RG-LRU, HGRN, minGRU, and with complex numbers S4D, S5 and LRU."""
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Inexact, Int, typed
from layers.arrays.dispatch import by_platform, kernel_modules
from layers.recurrences.context_parallel import Summary, varying_like
from layers.recurrences.diagonal import xla
from layers.recurrences.diagonal.parts import DiagonalCall, Parts, decay, split, to_complex
from layers.recurrences.diagonal.reference import sequential
from layers.recurrences.log_decay import check_log_decay
from layers.recurrences.segment_states import PADDING, Shards, run_segments

DiagonalImplementation = Literal["auto", "reference", "associative", "pallas_tpu", "pallas_gpu"]
SCANS = {"reference": sequential, "associative": xla.associative}


@typed
def diagonal_recurrence(
    x: Inexact[Array, "b t d"],
    *,
    a: Inexact[Array, "b t d"] | None = None,
    log_a: Float[Array, "b t d"] | None = None,
    initial_state: Inexact[Array, "b d"] | Inexact[Array, "b e d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    reverse: bool = False,
    implementation: DiagonalImplementation = "auto",
    axis_name: str | None = None,
    interpret: Any = False,
) -> tuple[Inexact[Array, "b t d"], Inexact[Array, "b d"] | Inexact[Array, "b e d"]]:
    """Runs h_t = a_t h_{t-1} + x_t over t; returns every h_t, in the dtype of x, and the last one.

    Griffin (arXiv 2402.19427) eq. 4 and HGRN (2311.04823) eq. 4, with the gate of the input left to the caller.
    The state is float32, or complex64 where x or a is complex.

    Args:
      a: factor per step and channel, signed or complex, of magnitude 1 at most.
      log_a: or its natural log, <= 0, float32 inside; exactly one of the two.
      initial_state: before the first token; or one for each of e segments. None means zeros.
      segment_ids: 0 is padding, whose y is 0 and which leaves the state alone; see `run_segments`.
      reverse: run from the last token to the first.
      implementation: "reference" is a scan, one step per token, which a CPU runs fastest; "associative" a parallel
        scan; "pallas_tpu" and "pallas_gpu" (NVIDIA's) are kernels, which read and write each element once; "auto"
        is "reference" for a single token and in programs for a CPU, otherwise the kernel of the platform, and
        "associative" where there is none, it lacks this case, or a mesh is in use, which is logged once. The
        compiler cannot split a kernel: with arrays on several devices call this inside jax.shard_map. Only
        "reference" and "associative" have forward-mode and second derivatives.
      axis_name: inside `jax.shard_map`, the axis of the mesh over which t is sharded, in order; see
        `gated_linear_attention`.
      interpret: for the kernels, True or parameters of one of Pallas's interpreters: run on any machine, slowly.
    Raises:
      ValueError: both of a and log_a are given, or neither; or, under `jax.debug_nans`, log_a > 0.
      NotImplementedError: the implementation asked for lacks this case; the message says why.
    """
    if (a is None) == (log_a is None):
        raise ValueError("give exactly one of a and log_a")
    if log_a is not None:
        check_log_decay(log_a, "log_a")
    gate = log_a if a is None else a
    is_complex = any(jnp.iscomplexobj(z) for z in (x, gate, initial_state) if z is not None)
    dtype = jnp.complex64 if is_complex else jnp.float32
    y_dtype = jnp.promote_types(x.dtype, dtype) if is_complex else x.dtype
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], x.shape[2]), dtype)
    implementation = "reference" if implementation == "auto" and x.shape[1] <= 1 else implementation
    call = DiagonalCall(a is None, reverse, implementation, interpret)

    def run(prepared, state):
        (x, gate), marks = prepared
        # Not `_recur` with a gradient of its own: others are tested against the gradient of the definition.
        recur = _recur if implementation not in SCANS else functools.partial(xla.forward, SCANS[implementation])
        h, last = recur(call, split(x), split(gate), split(state), marks)
        h, last = to_complex(h), to_complex(last)
        return h if marks is None else jnp.where((marks != PADDING)[..., None], h, 0), last

    def summarize(prepared):
        (_, gate), marks = prepared
        per_token = decay(call, split(gate), None if marks is None else marks[..., None])
        return Summary(jnp.prod(to_complex(per_token), axis=1), run(prepared, jnp.zeros_like(initial_state))[1])

    shards = None if axis_name is None else Shards(axis_name, summarize, jnp.multiply)
    initial_state = varying_like(initial_state.astype(dtype), jnp.real(x))
    y, last = run_segments(
        run, (x.astype(dtype) if is_complex else x, gate), initial_state, segment_ids,
        has_state_per_segment=initial_state.ndim == 3, reverse=reverse, flip_inputs=False, shards=shards)
    return y.astype(y_dtype), last


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(
    call: DiagonalCall, x: Parts, gate: Parts, state: Parts, marks: jax.Array | None
) -> tuple[Parts, Parts]:
    return _run("forward", call, x, gate, state, marks)


def _recur_fwd(call, x, gate, state, marks):
    h, last = _recur(call, x, gate, state, marks)
    # h in the dtype of x: its rounding is in the gradient of the gate once, as in any product of two arrays.
    return (h, last), (h, gate, state, marks)


def _recur_bwd(call, residuals, cotangents):
    # h_t feeds y_t and h_{t+1}, so its gradient is g_t = dy_t + conj(a_{t+1}) g_{t+1}: the recurrence backwards,
    # from that of the last state. Then dx_t = g_t, da_t = conj(h_{t-1}) g_t, and d log a_t = a_t da_t.
    return *_run("backward", call, *residuals, *cotangents), None


_recur.defvjp(_recur_fwd, _recur_bwd)


def _run(direction: Literal["forward", "backward"], call: DiagonalCall, h: Parts, gate: Parts, *others) -> Any:
    """Runs a kernel, or by "auto" what suits the platform; h stands for x in the forward direction."""
    modules = kernel_modules("recurrences.diagonal", call.implementation)
    run = {platform: functools.partial(getattr(xla, direction), scan, call)
           for platform, scan in (("cpu", sequential), ("default", xla.associative))}
    run |= {platform: functools.partial(getattr(module, direction), call) for platform, module in modules.items()}
    return by_platform(
        "diagonal_recurrence", run, h, gate, *others,
        reasons={platform: module.unsupported(call, h, gate) for platform, module in modules.items()},
        fallback="associative", implementation=call.implementation)
