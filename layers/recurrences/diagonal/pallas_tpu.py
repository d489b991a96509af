"""The diagonal recurrence for TPU: blocks of tokens in order, and the state between them in vector memory.

Inside a block, eight tokens at a time are the rows of registers. Three steps of doubling give for each of them a
product of decays and a sum over the tokens before it; the state that enters is then added to all eight. Tokens
past the end of the arrays are marked as padding, whatever lies there. A recurrence in reverse takes blocks, and
rows in them, from the last to the first.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
    where,
)
from layers.recurrences.segment_states import PADDING, REAL

LANES = 128
SUBLANES = 8            # rows of a register
TILE = 2 * SUBLANES     # rows of bfloat16 in one: tokens of a step of the loop
BLOCK_TOKENS, BLOCK_CHANNELS = 512, 512  # 1 MiB of float32; a gradient has five, twice, of 16 in vector memory


def unsupported(call: DiagonalCall, x: Parts, gate: Parts) -> str | None:
    """Returns why the kernel cannot run such a call; None if it can."""
    for name, array in (("x", x[0]), ("the gate", gate[0])):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {array.dtype.name}; float32, bfloat16 and complex64 fit"
    return None


def forward(
    call: DiagonalCall, x: Parts, gate: Parts, state: Parts, marks: jax.Array | None
) -> tuple[Parts, Parts]:
    """Returns every h_t in the dtype of x, at padding too, where it is the state; and the last one, float32."""
    grid = _Grid.from_parts(x, backwards=call.reverse)
    tokens, row = grid.token_spec(), grid.row_spec()
    return _launch(
        _forward_kernel, call, grid,
        inputs=dict(x=(x, tokens), gate=(gate, tokens), state=(state, row), marks=grid.pad_marks(marks)),
        outputs=((x, tokens), (state, row)))


def backward(
    call: DiagonalCall, h: Parts, gate: Parts, state: Parts, marks: jax.Array | None, dh: Parts, d_last: Parts
) -> tuple[Parts, Parts, Parts]:
    """Returns the gradients of x, the gate and the state."""
    grid = _Grid.from_parts(h, backwards=not call.reverse)
    tokens, row = grid.token_spec(), grid.row_spec()
    return _launch(
        _backward_kernel, call, grid,
        inputs=dict(h=(h, tokens), h_next=(h, grid.next_tile_spec()), gate=(gate, tokens), state=(state, row),
                    marks=grid.pad_marks(marks), dh=(dh, tokens), d_last=(d_last, row)),
        outputs=((h, tokens), (gate, tokens), (state, row)))


class _Grid(NamedTuple):
    """Blocks of arrays [b, t, d], and the order in which they are visited."""

    batch: int
    length: int
    width: int
    block_t: int
    block_d: int
    backwards: bool  # from the last token to the first

    @classmethod
    def from_parts(cls, parts: Parts, *, backwards: bool) -> "_Grid":
        batch, length, width = parts[0].shape
        block_d = BLOCK_CHANNELS // len(parts)
        return cls(batch, length, width, min(BLOCK_TOKENS, pl.cdiv(length, LANES) * LANES),
                   width if width <= block_d else block_d, backwards)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.batch, pl.cdiv(self.width, self.block_d), pl.cdiv(self.length, self.block_t)

    @property
    def num_tiles(self) -> int:
        return self.block_t // TILE

    @property
    def has_tail(self) -> bool:
        return self.length % self.block_t != 0

    def block(self, step: jax.Array) -> jax.Array:
        return self.sizes[2] - 1 - step if self.backwards else step

    def tile(self, step: jax.Array) -> jax.Array:
        return self.num_tiles - 1 - step if self.backwards else step

    def token_spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.block_t, self.block_d), lambda b, c, i: (b, self.block(i), c))

    def row_spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, self.block_d), lambda b, c, i: (b, 0, c))

    def next_tile_spec(self) -> pl.BlockSpec:
        """Gives the tile that is visited after the block; any, if there is none."""
        def index_map(b, c, i):
            first = self.block(i) * self.num_tiles
            after = jnp.maximum(first - 1, 0) if self.backwards else jnp.minimum(
                first + self.num_tiles, pl.cdiv(self.length, TILE) - 1)
            return b, after, c
        return pl.BlockSpec((None, TILE, self.block_d), index_map)

    def pad_marks(self, marks: jax.Array | None) -> tuple[jax.Array | None, pl.BlockSpec | None]:
        """Lays marks out in rows [b, 1, whole blocks], with padding past the end; None if all are real."""
        if marks is None and not self.has_tail:
            return None, None
        marks = jnp.full((self.batch, self.length), REAL) if marks is None else marks
        marks = jnp.pad(marks.astype(jnp.int32), ((0, 0), (0, self.sizes[2] * self.block_t - self.length)),
                        constant_values=PADDING)
        return marks[:, None], pl.BlockSpec((None, 1, self.block_t), lambda b, c, i: (b, 0, self.block(i)))


def _launch(
    kernel: Callable, call: DiagonalCall, grid: _Grid, *, inputs: dict[str, tuple[Any, Any]], outputs: tuple
) -> tuple[Parts, ...]:
    """Runs a kernel on inputs by their names, on outputs, and on the state between blocks.

    Args:
      inputs, outputs: Parts, or marks, with the spec of their blocks; an output has the shape of the Parts given.
        Rows [b, d] are given to the kernel as [b, 1, d]: blocks may then be one row high.
    """
    def spec_each(value, spec):
        return jax.tree.map(lambda _: spec, value)

    arrays = {name: jax.tree.map(lambda x: x[:, None] if x.ndim == 2 else x, value)
              for name, (value, _) in inputs.items()}
    out_shape = tuple(
        tuple(jax.ShapeDtypeStruct((x.shape[0], 1, x.shape[1]) if x.ndim == 2 else x.shape, x.dtype)
              for x in parts) for parts, _ in outputs)
    carry = (pltpu.VMEM((1, grid.block_d), jnp.float32),) * len(inputs["state"][0])
    read, written = jax.tree.leaves(arrays), jax.tree.leaves(out_shape)

    def body(inputs, *refs):
        *outputs, carry, columns = refs
        kernel(call, grid, *outputs, carry=carry, columns=columns, **inputs)

    results = pl.pallas_call(
        body, grid=grid.sizes, in_specs=({name: spec_each(*pair) for name, pair in inputs.items()},),
        out_specs=tuple(spec_each(*pair) for pair in outputs), out_shape=out_shape,
        scratch_shapes=(carry, pltpu.VMEM((grid.block_t, LANES), jnp.int32)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=20 * sum(x.size for x in read), transcendentals=call.is_log * arrays["gate"][0].size,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in [*read, *written])),
        name=f"diagonal_recurrence{kernel.__name__.removesuffix('_kernel')}", interpret=call.interpret,
    )(arrays)
    return jax.tree.map(lambda result, x: result.reshape(x.shape), results, tuple(parts for parts, _ in outputs))


def _forward_kernel(call: DiagonalCall, grid: _Grid, h, last, *, x, gate, state, marks, carry, columns):
    _begin(carry, state)
    _spread_marks(marks, columns)

    def step(i, before):
        rows = pl.ds(grid.tile(i) * TILE, TILE)
        mark = None if marks is None else _read_marks(columns, rows, grid)
        a, x_rows = decay(call, _read(gate, rows), mark), real_inputs(_read(x, rows), mark)
        states, before = _scan_tile(a, x_rows, before, backwards=grid.backwards)
        _write(h, rows, states)
        return before

    _end(carry, last, lax.fori_loop(0, grid.num_tiles, step, _read(carry)))


def _backward_kernel(
    call: DiagonalCall, grid: _Grid, dx, d_gate, d_state, *, h, h_next, gate, state, marks, dh, d_last, carry,
    columns,
):
    _begin(carry, d_last)
    _spread_marks(marks, columns)
    visited = pl.program_id(2)
    is_last_block, first_token = visited == grid.sizes[2] - 1, grid.block(visited) * grid.block_t

    # s_t = conj(a_t) g_t is what a token hands on to the one before it, and g_t = dh_t + s_{t+1}.
    def step(i, after):
        tile = grid.tile(i)
        rows = pl.ds(tile * TILE, TILE)
        mark = None if marks is None else _read_marks(columns, rows, grid)
        gate_rows, dh_rows = _read(gate, rows), real_inputs(_read(dh, rows), mark)
        a = conjugate(decay(call, gate_rows, mark))
        handed, last = _scan_tile(a, multiply(a, dh_rows), after, backwards=grid.backwards)
        g = add(dh_rows, _shifted(handed, after, backwards=grid.backwards))
        before = h_before(tile, i == grid.num_tiles - 1)
        for refs, gradient in zip((dx, d_gate), gradients(call, g, before, gate_rows, mark), strict=True):
            _write(refs, rows, gradient)
        return last

    def states(tile):
        parts = _read(h, pl.ds(tile * TILE, TILE))
        if not (call.reverse and grid.has_tail):
            return parts
        # Past the end lies anything; in reverse it comes first, where the state is still the initial one.
        is_inside = first_token + tile * TILE + lax.broadcasted_iota(jnp.int32, parts[0].shape, 0) < grid.length
        return tuple(jnp.where(is_inside, x, initial[...]) for x, initial in zip(parts, state, strict=True))

    def h_before(tile, is_last_tile):
        """Returns h_{t-1} of a tile, which the backward pass visits next."""
        neighbour = jnp.clip(tile - 1 if grid.backwards else tile + 1, 0, grid.num_tiles - 1)
        edge = slice(TILE - 1, TILE) if grid.backwards else slice(0, 1)
        near = [x[edge] for x in states(neighbour)]
        far = [jnp.where(is_last_block, initial[...], x[edge])
               for initial, x in zip(state, _read(h_next), strict=True)]
        edges = tuple(jnp.where(is_last_tile, *pair) for pair in zip(far, near, strict=True))
        return _shifted(states(tile), edges, backwards=not grid.backwards)

    _end(carry, d_state, lax.fori_loop(0, grid.num_tiles, step, _read(carry)))


def _begin(carry, state) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        for to, start in zip(carry, state, strict=True):
            to[...] = start[...]


def _end(carry, last, state: Parts) -> None:
    for to, final, x in zip(carry, last, state, strict=True):
        to[...] = x
        final[...] = x  # stays in vector memory until the last block


def _spread_marks(marks, columns) -> None:
    """Spreads marks [1, t] to [t, 128], each row full of its mark."""
    if marks is not None:
        columns[...] = jnp.broadcast_to(marks[...], (LANES, marks.shape[1])).T


def _read_marks(columns, rows, grid: _Grid) -> jax.Array:
    return jnp.broadcast_to(columns[rows, :1], (TILE, grid.block_d))


def _read(refs, rows=slice(None)) -> Parts:
    return to_float32(tuple(ref[rows, :] for ref in refs))


def _write(refs, rows, parts: Parts) -> None:
    for ref, x in zip(refs, parts, strict=True):
        ref[rows, :] = x.astype(ref.dtype)


def _scan_tile(a: Parts, x: Parts, state: Parts, *, backwards: bool) -> tuple[Parts, Parts]:
    """Returns the states of a tile's rows, and the one that leaves it."""
    results = []
    for start in range(0, TILE, SUBLANES)[:: -1 if backwards else 1]:
        a_rows, x_rows = (tuple(part[start: start + SUBLANES] for part in parts) for parts in (a, x))
        product, total = _double(a_rows, x_rows, backwards=backwards)
        rows = add(total, multiply(product, state))
        state = tuple(part[:1] if backwards else part[-1:] for part in rows)
        results.append(rows)
    results = results[::-1] if backwards else results
    return tuple(jnp.concatenate(parts, axis=0) for parts in zip(*results, strict=True)), state


def _double(a: Parts, x: Parts, *, backwards: bool) -> tuple[Parts, Parts]:
    """Returns for each row the product of the decays up to it, and its state if the one that enters is 0."""
    index = lax.broadcasted_iota(jnp.int32, a[0].shape, 0)
    index = SUBLANES - 1 - index if backwards else index
    for distance in (1, 2, 4):
        def earlier(parts: Parts, distance=distance) -> Parts:
            return tuple(pltpu.roll(part, SUBLANES - distance if backwards else distance, 0) for part in parts)

        is_inside = index >= distance
        x = add(x, multiply(a, where(is_inside, earlier(x), 0.0)))
        a = multiply(a, where(is_inside, earlier(a), 1.0))
    return a, x


def _shifted(parts: Parts, edge: Parts, *, backwards: bool) -> Parts:
    """Shifts rows by one in the order of the pass; the first becomes `edge`."""
    index = lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
    first, shift = (TILE - 1, TILE - 1) if backwards else (0, 1)
    return tuple(jnp.where(index == first, start, pltpu.roll(part, shift, 0))
                 for part, start in zip(parts, edge, strict=True))
