"""The diagonal recurrence for NVIDIA GPUs, in Pallas's Triton: a warp per 32 to 128 channels walks the tokens.

A warp keeps the state in registers, and asks for the next rows of tokens all at once before it uses any. Where
batch rows and channels alone are too few to keep the memory busy, time is cut into chunks as well: a first kernel
finds what each chunk makes of a state, the product of its decays and what it ends with when it begins with 0; in
the second, each chunk begins with what those before it make of the initial state. That reads inputs twice.
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
    Parts,
    Settings,
    added,
    conjugate,
    decay,
    gradients,
    plus,
    times,
    wide,
)
from layers.recurrences.segment_states import PADDING, REAL

CHANNELS = (128, 64, 32)  # of a program: 4, 2 or 1 for each thread of its only warp
AHEAD = 512               # elements of an array that a program reads ahead; with twice as many, registers run out
PROGRAMS = 512            # four for each multiprocessor of an H100; together they read ahead 2 MiB of float32
MAX_SIZE = 2**31 - 1      # of an array: addresses are 32 bits


def unsupported(settings: Settings, x: Parts, gate: Parts) -> str | None:
    """Why the kernel cannot run such a call; None if it can."""
    for name, array in (("x", x[0]), ("the gate", gate[0])):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"{name} is {array.dtype.name}; float32, bfloat16, float16 and complex64 fit"
    if x[0].size > MAX_SIZE:
        return f"x has {x[0].size} elements; the kernel can address {MAX_SIZE}"
    return None


def forward(
    settings: Settings, x: Parts, gate: Parts, state: Parts, marks: jax.Array | None
) -> tuple[Parts, Parts]:
    """Every h_t in the dtype of x, also at padding, where it is the state; and the last one, float32."""
    plan = _Plan.of(x, backwards=settings.reverse)
    inputs = dict(x=x, gate=gate, state=state, marks=marks)
    inputs["chunks"] = _summaries(settings, plan, x, gate, marks, is_gradient=False)
    return _launch(_forward_kernel, settings, plan, inputs, (x, state))


def backward(
    settings: Settings, h: Parts, gate: Parts, state: Parts, marks: jax.Array | None, dh: Parts, d_last: Parts
) -> tuple[Parts, Parts, Parts]:
    """The gradients of x, the gate and the state."""
    plan = _Plan.of(h, backwards=not settings.reverse)
    inputs = dict(h=h, gate=gate, initial=state, marks=marks, dh=dh, state=d_last)
    inputs["chunks"] = _summaries(settings, plan, dh, gate, marks, is_gradient=True)
    return _launch(_backward_kernel, settings, plan, inputs, (h, gate, state))


class _Plan(NamedTuple):
    """How arrays [b, t, d] are shared out among programs."""

    batch: int
    length: int
    width: int
    channels: int    # of a program
    rows: int        # tokens that it reads ahead
    num_chunks: int
    backwards: bool  # from the last token to the first

    @classmethod
    def of(cls, parts: Parts, *, backwards: bool) -> "_Plan":
        batch, length, width = parts[0].shape
        counts = {channels: batch * pl.cdiv(width, channels) for channels in CHANNELS}
        channels = next((each for each in CHANNELS if counts[each] >= PROGRAMS), CHANNELS[-1])
        rows = AHEAD // (channels * len(parts))
        num_chunks = max(1, min(PROGRAMS // counts[channels], length // (2 * rows)))
        return cls(batch, length, width, channels, rows, num_chunks, backwards)

    @property
    def turns(self) -> int:
        """Of a program, `rows` tokens each."""
        return pl.cdiv(pl.cdiv(self.length, self.num_chunks), self.rows)

    @property
    def has_tail(self) -> bool:
        return self.num_chunks * self.turns * self.rows != self.length

    def token(self, step: jax.Array) -> jax.Array:
        """The token of a step; past the end, the last one."""
        step = jnp.minimum(step, self.length - 1)
        return self.length - 1 - step if self.backwards else step


class _Place(NamedTuple):
    """What a program works on."""

    plan: _Plan
    chunk: jax.Array
    is_channel: jax.Array

    @classmethod
    def of(cls, plan: _Plan) -> "_Place":
        channel = pl.program_id(1) * plan.channels + jnp.arange(plan.channels)
        return cls(plan, pl.program_id(2), channel < plan.width)

    def step(self, turn: jax.Array, row: int) -> jax.Array:
        return (self.chunk * self.plan.turns + turn) * self.plan.rows + row

    def load(self, refs, index: jax.Array) -> Parts:
        """A row of each ref."""
        return wide(tuple(plgpu.load(ref.at[index], mask=self.is_channel, other=0) for ref in refs))

    def store(self, refs, step: jax.Array, parts: Parts) -> None:
        """A row, unless its token is past the end."""
        mask = self.is_channel & (step < self.plan.length) if self.plan.has_tail else self.is_channel
        for ref, x in zip(refs, parts, strict=True):
            plgpu.store(ref.at[self.plan.token(step)], x.astype(ref.dtype), mask=mask)

    def store_row(self, refs, parts: Parts) -> None:
        for ref, x in zip(refs, parts, strict=True):
            plgpu.store(ref, x, mask=self.is_channel)

    def mark(self, marks, step: jax.Array) -> jax.Array | None:
        """Of a step's token; past the end it is padding."""
        if marks is None and not self.plan.has_tail:
            return None
        mark = jnp.int32(REAL) if marks is None else plgpu.load(marks.at[self.plan.token(step)])
        return jnp.where(step < self.plan.length, mark, jnp.int32(PADDING))


def _summaries(
    settings: Settings, plan: _Plan, x: Parts, gate: Parts, marks: jax.Array | None, *, is_gradient: bool
) -> tuple[Parts, Parts] | None:
    """What each chunk makes of a state: the product of its decays, and its end from 0; both [b, chunks, d]."""
    if plan.num_chunks == 1:
        return None
    shape = (plan.batch, plan.num_chunks, plan.width)
    return _launch(
        functools.partial(_summary_kernel, is_gradient=is_gradient), settings, plan,
        dict(x=x, gate=gate, marks=marks),
        [tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for _ in parts) for parts in (gate, x)],
        name=f"diagonal_recurrence{'_backward' * is_gradient}_summary")


def _summary_kernel(settings: Settings, place: _Place, product, end, *, x, gate, marks, is_gradient: bool):
    def turn(i, carry):
        total, state = carry
        for a, x_row, _ in _rows(settings, place, i, x, gate, marks, is_gradient=is_gradient):
            x_row = times(a, x_row) if is_gradient else x_row
            total, state = times(a, total), plus(times(a, state), x_row)
        return total, state

    def constant(refs, value: float) -> Parts:
        return tuple(jnp.full((place.plan.channels,), value if i == 0 else 0.0) for i, _ in enumerate(refs))

    total, state = lax.fori_loop(0, place.plan.turns, turn, (constant(product, 1.0), constant(end, 0.0)))
    place.store_row(product, total)
    place.store_row(end, state)


def _forward_kernel(settings: Settings, place: _Place, h, last, *, x, gate, state, marks, chunks):
    def turn(i, state):
        results = []
        for a, x_row, _ in _rows(settings, place, i, x, gate, marks, is_gradient=False):
            state = plus(times(a, state), x_row)
            results.append(state)
        for row, states in enumerate(results):
            place.store(h, place.step(i, row), states)
        return state

    state = lax.fori_loop(0, place.plan.turns, turn, _entering(place, state, chunks))
    pl.when(place.chunk == place.plan.num_chunks - 1)(lambda: place.store_row(last, state))


def _backward_kernel(
    settings: Settings, place: _Place, dx, d_gate, d_state, *, h, gate, initial, marks, dh, state, chunks
):
    start = tuple(plgpu.load(ref, mask=place.is_channel, other=0) for ref in initial)

    # s_t = conj(a_t) g_t is what a token hands on to the one before it, and g_t = dh_t + s_{t+1}.
    def turn(i, handed):
        befores = []
        for row in range(place.plan.rows):
            step = place.step(i, row) + 1
            before = place.load(h, place.plan.token(step))
            befores.append(tuple(
                jnp.where(step < place.plan.length, x, x_0) for x, x_0 in zip(before, start, strict=True)))
        results = []
        rows = _rows(settings, place, i, dh, gate, marks, is_gradient=True)
        for row, (a, dh_row, (gate_row, mark)) in enumerate(rows):
            g = plus(dh_row, handed)
            handed = times(a, g)
            results.append(gradients(settings, g, befores[row], gate_row, mark))
        for row, (dx_row, d_gate_row) in enumerate(results):
            place.store(dx, place.step(i, row), dx_row)
            place.store(d_gate, place.step(i, row), d_gate_row)
        return handed

    handed = lax.fori_loop(0, place.plan.turns, turn, _entering(place, state, chunks))
    pl.when(place.chunk == place.plan.num_chunks - 1)(lambda: place.store_row(d_state, handed))


def _rows(settings: Settings, place: _Place, turn: jax.Array, x, gate, marks, *, is_gradient: bool) -> list[tuple]:
    """For each token of a turn its decay, what it adds, and its gate and mark; all are read before any is used."""
    steps = [place.step(turn, row) for row in range(place.plan.rows)]
    tokens = [place.plan.token(step) for step in steps]
    read = [(place.load(x, token), place.load(gate, token), place.mark(marks, step))
            for token, step in zip(tokens, steps, strict=True)]
    results = []
    for x_row, gate_row, mark in read:
        a = decay(settings, gate_row, mark)
        results.append((conjugate(a) if is_gradient else a, added(x_row, mark), (gate_row, mark)))
    return results


def _entering(place: _Place, state, chunks) -> Parts:
    """The state that enters a chunk: what the chunks before it make of the first."""
    start = tuple(plgpu.load(ref, mask=place.is_channel, other=0) for ref in state)
    if chunks is None:
        return start
    product, end = chunks

    def through(i, state):
        return plus(times(place.load(product, i), state), place.load(end, i))

    return lax.fori_loop(0, place.chunk, through, start)


def _launch(
    kernel: Callable, settings: Settings, plan: _Plan, inputs: dict[str, Any], outputs, *, name: str | None = None
) -> tuple[Parts, ...]:
    """Runs a kernel on inputs by their names; outputs are like the Parts given."""
    def spec(x, *, is_own_chunk: bool):
        if x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.integer):  # marks
            return pl.BlockSpec((None, x.shape[1]), lambda b, c, i: (b, 0))
        if x.ndim == 2:
            return pl.BlockSpec((None, plan.channels), lambda b, c, i: (b, c))
        if is_own_chunk:
            return pl.BlockSpec((None, None, plan.channels), lambda b, c, i: (b, i, c))
        return pl.BlockSpec((None, x.shape[1], plan.channels), lambda b, c, i: (b, 0, c))

    leaves, structure = jax.tree.flatten(inputs)
    flat, out_structure = jax.tree.flatten([tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in parts)
                                            for parts in outputs])

    def body(*refs):
        kernel(settings, _Place.of(plan), *jax.tree.unflatten(out_structure, refs[len(leaves):]),
               **jax.tree.unflatten(structure, refs[: len(leaves)]))

    is_summary = name is not None
    results = pl.pallas_call(
        body, grid=(plan.batch, pl.cdiv(plan.width, plan.channels), plan.num_chunks),
        in_specs=[spec(x, is_own_chunk=False) for x in leaves],
        out_specs=[spec(x, is_own_chunk=is_summary) for x in flat], out_shape=flat,
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        name=name or f"diagonal_recurrence{kernel.__name__.removesuffix('_kernel')}",
        interpret=settings.interpret,
    )(*leaves)
    return tuple(jax.tree.unflatten(out_structure, results))
