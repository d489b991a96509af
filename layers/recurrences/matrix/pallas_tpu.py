"""The matrix recurrence for TPU: a head's chunks of tokens in order, and the state between them in vector memory.

Each chunk is `one_chunk`, of one head. The backward pass visits the chunks from the last to the first: from the
state that entered each, which the forward pass keeps for it, it computes the chunk again and its gradient, and
hands the gradient of that state to the chunk before.
"""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from layers.recurrences.matrix.chunkwise import one_chunk
from layers.recurrences.matrix.kernel_layout import (
    gradients_like,
    like,
    move_heads_first,
    move_inputs_heads_first,
    move_tokens_first,
    sum_shared,
)
from layers.recurrences.matrix.step_inputs import MatrixCall, StepInputs
from layers.recurrences.matrix.tile_decays import TileDecays

CHUNK = 64  # tokens; more fill a matrix unit better, and take less memory for states
ROWS = 16   # of a tile of bfloat16: a chunk has whole ones
MAX_KEY_WIDTH, MAX_STATE = 512, 512 * 256  # numbers for which the gradient has room
VECTOR_MEMORY_BYTES = 48 * 2**20           # of 64 MiB or more
one_head_chunk = functools.partial(one_chunk, make_decays=TileDecays.from_log_decay)


def unsupported(inputs: StepInputs) -> str | None:
    """Returns why the kernel cannot run such a call; None if it can."""
    for name, x in inputs._asdict().items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype.name}; float32 and bfloat16 fit"
    key_width, value_width = inputs.k.shape[-1], inputs.v.shape[-1]
    if key_width > MAX_KEY_WIDTH or key_width * value_width > MAX_STATE:
        return (f"a state of {key_width} x {value_width} is too large for vector memory; {MAX_STATE} numbers fit, "
                f"and keys of {MAX_KEY_WIDTH}")
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def run(call: MatrixCall, inputs: StepInputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns every o_t and the last state."""
    arrays, kernel = _forward(call, inputs, state, keep_states=False)
    (o, _), last = kernel(arrays, state)
    return move_tokens_first(o, inputs.v.shape[1]), last


@functools.partial(jax.jit, static_argnums=0)
def _run_fwd(call: MatrixCall, inputs: StepInputs, state: jax.Array):
    """Keeps the states that enter the chunks besides, [b, n, r, chunks, k, v]."""
    arrays, kernel = _forward(call, inputs, state, keep_states=True)
    (o, states), last = kernel(arrays, state)
    return (move_tokens_first(o, inputs.v.shape[1]), last), (inputs, states)


@functools.partial(jax.jit, static_argnums=0)
def _run_bwd(call: MatrixCall, residuals, cotangents) -> tuple[StepInputs, jax.Array]:
    """Returns the gradients of the inputs and of the state that enters the first token."""
    (inputs, states), (do, d_last) = residuals, cotangents
    grid = _Grid.from_inputs(inputs, backwards=True)
    arrays = move_inputs_heads_first(inputs, grid.chunk)
    chunks = (arrays, states, move_heads_first(do, grid.chunk))
    gradients, d_state = _make_kernel(
        _backward_kernel, call, grid, chunks, d_last, gradients_like(arrays, inputs.v.shape[3]))(chunks, d_last)
    return sum_shared(gradients, inputs), d_state


run.defvjp(_run_fwd, _run_bwd)


class _Grid(NamedTuple):
    """Heads and chunks of a call, and the order in which the chunks of a head are visited."""

    sizes: tuple[int, int, int, int]  # b, n, r, chunks
    chunk: int                        # tokens
    backwards: bool

    @classmethod
    def from_inputs(cls, inputs: StepInputs, *, backwards: bool) -> "_Grid":
        batch, length, num_key_heads, repeats = inputs.v.shape[:4]
        chunk = min(CHUNK, pl.cdiv(length, ROWS) * ROWS)
        return cls((batch, num_key_heads, repeats, pl.cdiv(length, chunk)), chunk, backwards)

    @property
    def num_chunks(self) -> int:
        return self.sizes[3]

    def chunk_spec(self, x: jax.Array) -> pl.BlockSpec:
        """Gives the chunk of x [b, n, r, tokens, width] or [b, n, r, chunks, ...]; r is 1 where heads share."""
        is_shared = x.shape[2] < self.sizes[2]

        def index_map(b, n, r, i):
            i = self.num_chunks - 1 - i if self.backwards else i
            return b, n, 0 if is_shared else r, i, *(0,) * (x.ndim - 4)

        rows = self.chunk if x.ndim == 5 else None
        return pl.BlockSpec((None, None, None, rows, *x.shape[4:]), index_map)

    def head_spec(self, x: jax.Array) -> pl.BlockSpec:
        """Gives the state of x [b, n, r, k, v]."""
        return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, n, r, i: (b, n, r, 0, 0))


def _forward(
    call: MatrixCall, inputs: StepInputs, state: jax.Array, *, keep_states: bool
) -> tuple[StepInputs, Callable]:
    """Returns the inputs as the kernel reads them, and the kernel."""
    grid = _Grid.from_inputs(inputs, backwards=False)
    arrays = move_inputs_heads_first(inputs, grid.chunk)
    states = like(state, (*state.shape[:3], grid.num_chunks, *state.shape[3:]), jnp.float32)
    outputs = (like(arrays.v, arrays.v.shape, arrays.v.dtype), states if keep_states else None)
    return arrays, _make_kernel(_forward_kernel, call, grid, arrays, state, outputs)


def _make_kernel(
    kernel: Callable, call: MatrixCall, grid: _Grid, chunks: Any, entering: jax.Array, outputs: Any
) -> Callable[[Any, jax.Array], tuple[Any, jax.Array]]:
    """Makes a function of chunks and an entering state, which returns output chunks and the leaving state."""
    specs = functools.partial(jax.tree.map, grid.chunk_spec)
    state_spec = grid.head_spec(entering)
    return pl.pallas_call(
        functools.partial(kernel, call), grid=grid.sizes, in_specs=(specs(chunks), state_spec),
        out_specs=(specs(outputs), state_spec), out_shape=(outputs, like(entering, entering.shape, jnp.float32)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VECTOR_MEMORY_BYTES),
        name=f"matrix_recurrence{kernel.__name__.removesuffix('_kernel')}", interpret=call.interpret)


def _forward_kernel(call: MatrixCall, inputs: StepInputs, initial, outputs, carry):
    o, states = outputs
    _begin(carry, initial)
    state = carry[...]
    if states is not None:
        states[...] = state
    carry[...], o_chunk = one_head_chunk(call, state, _read(inputs))
    o[...] = o_chunk.astype(o.dtype)


def _backward_kernel(call: MatrixCall, chunks, d_last, gradients: StepInputs, carry):
    inputs, state, do = chunks
    _begin(carry, d_last)
    _, pull_back = jax.vjp(functools.partial(one_head_chunk, call), state[...], _read(inputs))
    carry[...], chunk_gradients = pull_back((carry[...], do[...].astype(jnp.float32)))
    for ref, gradient in zip(jax.tree.leaves(gradients), jax.tree.leaves(chunk_gradients), strict=True):
        ref[...] = gradient.astype(ref.dtype)


def _begin(carry, first) -> None:
    """Initialises the carried state, an output block that stays in vector memory across a head's chunks."""
    @pl.when(pl.program_id(3) == 0)
    def _():
        carry[...] = first[...]


def _read(refs: Any) -> Any:
    return jax.tree.map(lambda ref: ref[...].astype(jnp.float32), refs)
