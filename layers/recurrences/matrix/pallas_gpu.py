"""The matrix recurrence for NVIDIA GPUs, in Pallas's Triton: a program per head and tile of the values' width.

Columns of a state know nothing of each other, so a program keeps its own in registers and walks the chunks; each
is `one_chunk`, and backwards its gradient, from the states that the forward pass kept. Queries, keys and decays,
which all tiles read, get a gradient from each of them, added up at the end.
"""
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from layers.recurrences.matrix.chunkwise import one_chunk
from layers.recurrences.matrix.decays import exact_matmul
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

SMALLEST = 16         # of all sides of a matmul, which are powers of two
CHUNK = SMALLEST      # tokens; with twice as many, keys of 128 numbers take more registers than there are
TILE = 32             # columns of a state in a program
WARPS = 4             # all of which hold the keys of a chunk: more would leave no more registers for others
MAX_KEY_WIDTH = 256   # rows of a state
MAX_SIZE = 2**31 - 1  # of an array, of which that of states is the largest: addresses are 32 bits
# Float32 by tensor cores: HIGHEST does without them.
three_tf32_matmul = functools.partial(jnp.matmul, precision=lax.DotAlgorithmPreset.TF32_TF32_F32_X3)


def unsupported(inputs: StepInputs) -> str | None:
    """Returns why the kernel cannot run such a call; None if it can."""
    for name, x in inputs._asdict().items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"{name} is {x.dtype.name}; float32, bfloat16 and float16 fit"
    if inputs.k.shape[-1] > MAX_KEY_WIDTH:
        return f"keys are {inputs.k.shape[-1]} wide; {MAX_KEY_WIDTH} is the most"
    grid = _Grid.from_inputs(inputs)
    size = math.prod(grid.heads) * grid.num_chunks * grid.key_width * grid.num_tiles * grid.tile
    if size > MAX_SIZE:
        return f"the states between chunks are {size} numbers; the kernel can address {MAX_SIZE}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def run(call: MatrixCall, inputs: StepInputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns every o_t and the last state."""
    arrays, kernel = _forward(call, inputs, state, keep_states=False)
    return _narrow_outputs(*kernel(*arrays)[:2], inputs.v, state)


@functools.partial(jax.jit, static_argnums=0)
def _run_fwd(call: MatrixCall, inputs: StepInputs, state: jax.Array):
    """Keeps the states that enter the chunks besides, [b, n, r, chunks, k, v]."""
    arrays, kernel = _forward(call, inputs, state, keep_states=True)
    o, last, states = kernel(*arrays)
    return _narrow_outputs(o, last, inputs.v, state), (inputs, states)


@functools.partial(jax.jit, static_argnums=0)
def _run_bwd(call: MatrixCall, residuals, cotangents) -> tuple[StepInputs, jax.Array]:
    """Returns the gradients of the inputs and of the state that enters the first token."""
    (inputs, states), (do, d_last) = residuals, cotangents
    grid = _Grid.from_inputs(inputs)
    arrays, at_end = grid.widen(move_inputs_heads_first(inputs, CHUNK)), grid.widen_state(d_last)
    do = _pad_columns(move_heads_first(do, CHUNK), arrays.v.shape[4])
    gradients = grid.repeat_for_tiles(gradients_like(arrays, inputs.v.shape[3]))
    kernel = _make_kernel(
        _backward_kernel, call, grid, outputs=(gradients, like(at_end, at_end.shape, jnp.float32)),
        in_specs=(grid.input_specs(arrays), *map(grid.column_spec, (states, do, at_end))),
        out_specs=(grid.gradient_specs(gradients), grid.column_spec(at_end)))
    gradients, d_state = kernel(arrays, states, do, at_end)
    shared = jax.tree.map(lambda x: jnp.sum(x, axis=3), gradients._replace(v=None))
    return sum_shared(shared._replace(v=gradients.v), inputs), _narrow_state(d_state, d_last)


run.defvjp(_run_fwd, _run_bwd)


class _Grid(NamedTuple):
    """Programs of a call: one per head and tile of its columns."""

    heads: tuple[int, int, int]  # b, n, r
    num_chunks: int
    key_width: int               # padded with zeros, as are the num_tiles * tile columns
    num_tiles: int
    tile: int                    # columns of a state

    @classmethod
    def from_inputs(cls, inputs: StepInputs) -> "_Grid":
        batch, length, num_key_heads, repeats, width = inputs.v.shape
        tile = min(TILE, _next_power(width))
        return cls((batch, num_key_heads, repeats), pl.cdiv(length, CHUNK), _next_power(inputs.k.shape[-1]),
                   pl.cdiv(width, tile), tile)

    def widen(self, arrays: StepInputs) -> StepInputs:
        """Pads with zeros, which change no product; those of log decays are of channels that hold nothing."""
        wide = jax.tree.map(
            lambda x: x if x.ndim == 6 else _pad_columns(x, self.key_width), arrays._replace(v=None))
        return wide._replace(v=_pad_columns(arrays.v, self.num_tiles * self.tile))

    def widen_state(self, state: jax.Array) -> jax.Array:
        state = jnp.pad(state, (*((0, 0),) * 3, (0, self.key_width - state.shape[3]), (0, 0)))
        return _pad_columns(state, self.num_tiles * self.tile)

    def repeat_for_tiles(self, gradients: StepInputs) -> StepInputs:
        """Gives shared inputs a gradient per tile [b, n, r, tiles, ...], float32 if there are several to sum."""
        def repeat(x):
            dtype = jnp.float32 if self.num_tiles > 1 else x.dtype
            return jax.ShapeDtypeStruct((*x.shape[:3], self.num_tiles, *x.shape[3:]), dtype,
                                        manual_axis_type=x.manual_axis_type)

        return jax.tree.map(repeat, gradients._replace(v=None))._replace(v=gradients.v)

    def column_spec(self, x: Any) -> pl.BlockSpec:
        """Gives the columns of a tile of x [b, n, r, ..., v]."""
        return pl.BlockSpec((None, None, None, *x.shape[3:-1], self.tile),
                            lambda b, n, r, tile: (b, n, r, *(0,) * (len(x.shape) - 4), tile))

    def input_specs(self, arrays: StepInputs) -> StepInputs:
        """Gives all of arrays [b, n, r, ...] of a head, where r is 1 if heads share, but of v the columns."""
        def spec(x):
            is_shared = x.shape[2] < self.heads[2]
            return pl.BlockSpec((None, None, None, *x.shape[3:]),
                                lambda b, n, r, tile: (b, n, 0 if is_shared else r, *(0,) * (x.ndim - 3)))

        return jax.tree.map(spec, arrays)._replace(v=self.column_spec(arrays.v))

    def gradient_specs(self, gradients: StepInputs) -> StepInputs:
        """Gives the gradients of a tile, as `repeat_for_tiles` lays them out."""
        def spec(x):
            return pl.BlockSpec((None, None, None, None, *x.shape[4:]),
                                lambda b, n, r, tile: (b, n, r, tile, *(0,) * (len(x.shape) - 4)))

        return jax.tree.map(spec, gradients)._replace(v=self.column_spec(gradients.v))


def _forward(
    call: MatrixCall, inputs: StepInputs, state: jax.Array, *, keep_states: bool
) -> tuple[tuple[StepInputs, jax.Array], Callable]:
    """Returns the inputs and the state as the kernel reads them, and the kernel."""
    grid = _Grid.from_inputs(inputs)
    arrays, initial = grid.widen(move_inputs_heads_first(inputs, CHUNK)), grid.widen_state(state)
    states = like(initial, (*initial.shape[:3], grid.num_chunks, *initial.shape[3:]), jnp.float32)
    outputs = (like(arrays.v, arrays.v.shape, arrays.v.dtype), like(initial, initial.shape, jnp.float32),
               states if keep_states else None)
    return (arrays, initial), _make_kernel(
        _forward_kernel, call, grid, outputs=outputs,
        in_specs=(grid.input_specs(arrays), grid.column_spec(initial)),
        out_specs=jax.tree.map(grid.column_spec, outputs))


def _make_kernel(
    kernel: Callable, call: MatrixCall, grid: _Grid, *, outputs: Any, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Makes a function of arrays with `in_specs`, which returns `outputs`."""
    exact = exact_matmul if call.interpret else three_tf32_matmul
    advance = functools.partial(one_chunk, call, make_decays=TileDecays.from_log_decay, exact=exact)
    return pl.pallas_call(
        functools.partial(kernel, advance, grid), grid=(*grid.heads, grid.num_tiles), in_specs=in_specs,
        out_specs=out_specs, out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        name=f"matrix_recurrence{kernel.__name__.removesuffix('_kernel')}", interpret=call.interpret)


def _forward_kernel(advance: Callable, grid: _Grid, inputs: StepInputs, initial, o, last, states):
    def step(i, state):
        if states is not None:
            states[i] = state
        # By `vjp`, as Triton has a rule for what that makes of a function with a gradient of its own.
        (state, o_chunk), _ = jax.vjp(advance, state, _read(inputs, i))
        o[_rows(i), :] = o_chunk.astype(o.dtype)
        return state

    last[...] = lax.fori_loop(0, grid.num_chunks, step, initial[...])


def _backward_kernel(
    advance: Callable, grid: _Grid, inputs: StepInputs, states, do, d_last, gradients, d_state
):
    def step(num_done, d_after):
        i = grid.num_chunks - 1 - num_done
        _, pull_back = jax.vjp(advance, states[i], _read(inputs, i))
        d_before, chunk_gradients = pull_back((d_after, do[_rows(i), :].astype(jnp.float32)))
        for ref, gradient in zip(jax.tree.leaves(gradients), jax.tree.leaves(chunk_gradients), strict=True):
            ref[_chunk_index(ref, i)] = gradient.astype(ref.dtype)
        return d_before

    d_state[...] = lax.fori_loop(0, grid.num_chunks, step, d_last[...])


def _read(inputs: StepInputs, i: jax.Array) -> StepInputs:
    return jax.tree.map(lambda ref: ref[_chunk_index(ref, i)].astype(jnp.float32), inputs)


def _chunk_index(ref: Any, i: jax.Array) -> Any:
    """Indexes the i-th chunk: in rows of a chunk each [chunks, 1, c], or of a token [chunks * c, width]."""
    return i if len(ref.shape) == 3 else (_rows(i), slice(None))


def _rows(i: jax.Array) -> pl.Slice:
    return pl.ds(i * CHUNK, CHUNK)


def _narrow_outputs(
    o: jax.Array, last: jax.Array, v: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return move_tokens_first(o, v.shape[1])[..., : state.shape[4]], _narrow_state(last, state)


def _narrow_state(state: jax.Array, target: jax.Array) -> jax.Array:
    return state[..., : target.shape[3], : target.shape[4]]


def _pad_columns(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, width - x.shape[-1])))


def _next_power(width: int) -> int:
    return max(SMALLEST, pl.next_power_of_2(width))
