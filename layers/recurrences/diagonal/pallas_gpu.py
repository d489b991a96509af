"""The diagonal recurrence for NVIDIA GPUs, in Pallas's Triton: a warp per 32 to 128 channels walks the tokens.

A warp keeps the state in registers, and asks for the next rows of tokens all at once before it uses any. Where
batch rows and channels alone are too few to keep the memory busy, time is cut into chunks as well: a first kernel
summarises each chunk, by the product of its decays and its last state when it begins with 0; in the second, each
chunk begins with the initial state as the earlier chunks have changed it. That reads inputs twice.
"""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from layers.recurrences.diagonal.parts import (
    DiagonalCall,
    Parts,
    add,
    conjugate,
    decay,
    gradients,
    multiply,
    real_inputs,
    to_float32,
)
from layers.recurrences.segment_states import PADDING, REAL

CHANNELS = (128, 64, 32)  # of a program: 4, 2 or 1 for each thread of its only warp
AHEAD = 512               # elements of an array that a program reads ahead; with twice as many, registers run out
PROGRAMS = 512            # four for each multiprocessor of an H100; together they read ahead 2 MiB of float32
MAX_SIZE = 2**31 - 1      # of an array: addresses are 32 bits


def unsupported(call: DiagonalCall, x: Parts, gate: Parts) -> str | None:
    """Returns why the kernel cannot run such a call; None if it can."""
    for name, array in (("x", x[0]), ("the gate", gate[0])):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"{name} is {array.dtype.name}; float32, bfloat16, float16 and complex64 fit"
    if x[0].size > MAX_SIZE:
        return f"x has {x[0].size} elements; the kernel can address {MAX_SIZE}"
    return None


def forward(
    call: DiagonalCall, x: Parts, gate: Parts, state: Parts, marks: jax.Array | None
) -> tuple[Parts, Parts]:
    """Returns every h_t in the dtype of x, at padding too, where it is the state; and the last one, float32."""
    grid = _Grid.from_parts(x, backwards=call.reverse)
    inputs = dict(x=x, gate=gate, state=state, marks=marks)
    inputs["chunks"] = _summaries(call, grid, x, gate, marks, is_gradient=False)
    return _launch(_forward_kernel, call, grid, inputs, (x, state))


def backward(
    call: DiagonalCall, h: Parts, gate: Parts, state: Parts, marks: jax.Array | None, dh: Parts, d_last: Parts
) -> tuple[Parts, Parts, Parts]:
    """Returns the gradients of x, the gate and the state."""
    grid = _Grid.from_parts(h, backwards=not call.reverse)
    inputs = dict(h=h, gate=gate, initial=state, marks=marks, dh=dh, state=d_last)
    inputs["chunks"] = _summaries(call, grid, dh, gate, marks, is_gradient=True)
    return _launch(_backward_kernel, call, grid, inputs, (h, gate, state))


class _Grid(NamedTuple):
    """Programs of a call on arrays [b, t, d], and the order in which they visit tokens."""

    batch: int
    length: int
    width: int
    channels: int    # per program
    rows: int        # tokens that a program reads ahead
    num_chunks: int
    backwards: bool  # from the last token to the first

    @classmethod
    def from_parts(cls, parts: Parts, *, backwards: bool) -> "_Grid":
        batch, length, width = parts[0].shape
        counts = {channels: batch * pl.cdiv(width, channels) for channels in CHANNELS}
        channels = next((each for each in CHANNELS if counts[each] >= PROGRAMS), CHANNELS[-1])
        rows = AHEAD // (channels * len(parts))
        num_chunks = max(1, min(PROGRAMS // counts[channels], length // (2 * rows)))
        return cls(batch, length, width, channels, rows, num_chunks, backwards)

    @property
    def num_steps(self) -> int:
        """Steps of a program, of `rows` tokens each."""
        return pl.cdiv(pl.cdiv(self.length, self.num_chunks), self.rows)

    @property
    def has_tail(self) -> bool:
        return self.num_chunks * self.num_steps * self.rows != self.length

    def token(self, index: jax.Array) -> jax.Array:
        """Returns the token visited at an index; past the end, the last one."""
        index = jnp.minimum(index, self.length - 1)
        return self.length - 1 - index if self.backwards else index


class _Program(NamedTuple):
    """Chunk and channels of one program, and its reads and writes."""

    grid: _Grid
    chunk: jax.Array
    is_channel: jax.Array

    @classmethod
    def current(cls, grid: _Grid) -> "_Program":
        channel = pl.program_id(1) * grid.channels + jnp.arange(grid.channels)
        return cls(grid, pl.program_id(2), channel < grid.width)

    def index(self, step: jax.Array, row: int) -> jax.Array:
        """Returns the index, in the order of visits, of a row of a step."""
        return (self.chunk * self.grid.num_steps + step) * self.grid.rows + row

    def load(self, refs, row: jax.Array) -> Parts:
        """Loads a row of each ref."""
        return to_float32(tuple(plgpu.load(ref.at[row], mask=self.is_channel, other=0) for ref in refs))

    def store(self, refs, index: jax.Array, parts: Parts) -> None:
        """Stores a row unless its token is past the end."""
        mask = self.is_channel & (index < self.grid.length) if self.grid.has_tail else self.is_channel
        for ref, x in zip(refs, parts, strict=True):
            plgpu.store(ref.at[self.grid.token(index)], x.astype(ref.dtype), mask=mask)

    def store_row(self, refs, parts: Parts) -> None:
        for ref, x in zip(refs, parts, strict=True):
            plgpu.store(ref, x, mask=self.is_channel)

    def mark(self, marks, index: jax.Array) -> jax.Array | None:
        """Loads the mark of a token; past the end it is padding."""
        if marks is None and not self.grid.has_tail:
            return None
        mark = jnp.int32(REAL) if marks is None else plgpu.load(marks.at[self.grid.token(index)])
        return jnp.where(index < self.grid.length, mark, jnp.int32(PADDING))


def _summaries(
    call: DiagonalCall, grid: _Grid, x: Parts, gate: Parts, marks: jax.Array | None, *, is_gradient: bool
) -> tuple[Parts, Parts] | None:
    """Returns the product of decays of each chunk, and its last state from 0, both [b, chunks, d]."""
    if grid.num_chunks == 1:
        return None
    shape = (grid.batch, grid.num_chunks, grid.width)
    return _launch(
        functools.partial(_summary_kernel, is_gradient=is_gradient), call, grid,
        dict(x=x, gate=gate, marks=marks),
        [tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for _ in parts) for parts in (gate, x)],
        name=f"diagonal_recurrence{'_backward' * is_gradient}_summary")


def _summary_kernel(call: DiagonalCall, program: _Program, product, end, *, x, gate, marks, is_gradient: bool):
    def step(i, carry):
        total, state = carry
        for a, x_row, _ in _read_rows(call, program, i, x, gate, marks, is_gradient=is_gradient):
            x_row = multiply(a, x_row) if is_gradient else x_row
            total, state = multiply(a, total), add(multiply(a, state), x_row)
        return total, state

    def constant(refs, value: float) -> Parts:
        return tuple(jnp.full((program.grid.channels,), value if i == 0 else 0.0) for i, _ in enumerate(refs))

    total, state = lax.fori_loop(0, program.grid.num_steps, step, (constant(product, 1.0), constant(end, 0.0)))
    program.store_row(product, total)
    program.store_row(end, state)


def _forward_kernel(call: DiagonalCall, program: _Program, h, last, *, x, gate, state, marks, chunks):
    def step(i, state):
        results = []
        for a, x_row, _ in _read_rows(call, program, i, x, gate, marks, is_gradient=False):
            state = add(multiply(a, state), x_row)
            results.append(state)
        for row, states in enumerate(results):
            program.store(h, program.index(i, row), states)
        return state

    state = lax.fori_loop(0, program.grid.num_steps, step, _entering_state(program, state, chunks))
    pl.when(program.chunk == program.grid.num_chunks - 1)(lambda: program.store_row(last, state))


def _backward_kernel(
    call: DiagonalCall, program: _Program, dx, d_gate, d_state, *, h, gate, initial, marks, dh, state, chunks
):
    start = tuple(plgpu.load(ref, mask=program.is_channel, other=0) for ref in initial)

    # s_t = conj(a_t) g_t is what a token hands on to the one before it, and g_t = dh_t + s_{t+1}.
    def step(i, handed):
        befores = []
        for row in range(program.grid.rows):
            after = program.index(i, row) + 1  # in the order of the pass, hence the token before
            before = program.load(h, program.grid.token(after))
            befores.append(tuple(
                jnp.where(after < program.grid.length, x, x_0) for x, x_0 in zip(before, start, strict=True)))
        results = []
        rows = _read_rows(call, program, i, dh, gate, marks, is_gradient=True)
        for row, (a, dh_row, (gate_row, mark)) in enumerate(rows):
            g = add(dh_row, handed)
            handed = multiply(a, g)
            results.append(gradients(call, g, befores[row], gate_row, mark))
        for row, (dx_row, d_gate_row) in enumerate(results):
            program.store(dx, program.index(i, row), dx_row)
            program.store(d_gate, program.index(i, row), d_gate_row)
        return handed

    handed = lax.fori_loop(0, program.grid.num_steps, step, _entering_state(program, state, chunks))
    pl.when(program.chunk == program.grid.num_chunks - 1)(lambda: program.store_row(d_state, handed))


def _read_rows(
    call: DiagonalCall, program: _Program, step: jax.Array, x, gate, marks, *, is_gradient: bool
) -> list[tuple]:
    """Reads the rows of a step; returns for each its decay, its input, and its gate and mark.

    All are read before any is used.
    """
    indices = [program.index(step, row) for row in range(program.grid.rows)]
    tokens = [program.grid.token(index) for index in indices]
    read = [(program.load(x, token), program.load(gate, token), program.mark(marks, index))
            for token, index in zip(tokens, indices, strict=True)]
    results = []
    for x_row, gate_row, mark in read:
        a = decay(call, gate_row, mark)
        results.append((conjugate(a) if is_gradient else a, real_inputs(x_row, mark), (gate_row, mark)))
    return results


def _entering_state(program: _Program, state, chunks) -> Parts:
    """Returns the state that enters a chunk, which the earlier chunks have made of the first."""
    start = tuple(plgpu.load(ref, mask=program.is_channel, other=0) for ref in state)
    if chunks is None:
        return start
    product, end = chunks

    def pass_chunk(i, state):
        return add(multiply(program.load(product, i), state), program.load(end, i))

    return lax.fori_loop(0, program.chunk, pass_chunk, start)


def _launch(
    kernel: Callable, call: DiagonalCall, grid: _Grid, inputs: dict[str, Any], outputs, *, name: str | None = None
) -> tuple[Parts, ...]:
    """Runs a kernel on inputs by their names; its outputs have the shapes of the Parts given."""
    def spec(x, *, is_own_chunk: bool):
        if x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.integer):  # marks
            return pl.BlockSpec((None, x.shape[1]), lambda b, c, i: (b, 0))
        if x.ndim == 2:
            return pl.BlockSpec((None, grid.channels), lambda b, c, i: (b, c))
        if is_own_chunk:
            return pl.BlockSpec((None, None, grid.channels), lambda b, c, i: (b, i, c))
        return pl.BlockSpec((None, x.shape[1], grid.channels), lambda b, c, i: (b, 0, c))

    def body(inputs, *outputs):
        kernel(call, _Program.current(grid), *outputs, **inputs)

    is_summary = name is not None
    outputs = tuple(tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in parts) for parts in outputs)
    return pl.pallas_call(
        body, grid=(grid.batch, pl.cdiv(grid.width, grid.channels), grid.num_chunks),
        in_specs=(jax.tree.map(functools.partial(spec, is_own_chunk=False), inputs),),
        out_specs=jax.tree.map(functools.partial(spec, is_own_chunk=is_summary), outputs), out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        name=name or f"diagonal_recurrence{kernel.__name__.removesuffix('_kernel')}",
        interpret=call.interpret,
    )(inputs)
