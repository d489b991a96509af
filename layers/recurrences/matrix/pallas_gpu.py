"""The matrix recurrence for NVIDIA GPUs, in Pallas's Triton: a program per head and tile of the values' width.

Columns of a state know nothing of each other, so a program keeps its own in registers and walks the chunks; what
happens within one is `one_chunk`, and backwards its gradient, from the states that the forward pass wrote down.
What all tiles read, queries, keys and decays, has a gradient from each of them, added up at the end.
"""
import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from layers.recurrences.matrix.by_heads import by_heads, gradients_of, head_first, like, summed, token_first
from layers.recurrences.matrix.chunkwise import one_chunk
from layers.recurrences.matrix.decays import exact_matmuls_as
from layers.recurrences.matrix.tile_decays import TileDecays
from layers.recurrences.matrix.tokens import Settings, Tokens

SMALLEST = 16         # of all sides of a matmul, which are powers of two
CHUNK = SMALLEST      # tokens; with twice as many, keys of 128 numbers take more registers than there are
TILE = 32             # columns of a state in a program
WARPS = 4             # all of which hold the keys of a chunk: more would leave no more registers for others
MAX_KEY_WIDTH = 256   # rows of a state
THREE_TF32 = lax.DotAlgorithmPreset.TF32_TF32_F32_X3  # float32 by tensor cores, for HIGHEST does without them
MAX_SIZE = 2**31 - 1  # of an array, of which that of states is the largest: addresses are 32 bits


def unsupported(tokens: Tokens) -> str | None:
    """Why the kernel cannot run such a call; None if it can."""
    for name, x in tokens._asdict().items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"{name} is {x.dtype.name}; float32, bfloat16 and float16 fit"
    if tokens.k.shape[-1] > MAX_KEY_WIDTH:
        return f"keys are {tokens.k.shape[-1]} wide; {MAX_KEY_WIDTH} is the most"
    plan = _Plan.of(tokens)
    size = math.prod(plan.heads) * plan.num_chunks * plan.key_width * plan.num_tiles * plan.tile
    if size > MAX_SIZE:
        return f"the states between chunks are {size} numbers; the kernel can address {MAX_SIZE}"
    return None


@functools.partial(jax.jit, static_argnums=0, static_argnames="keep_states")
def forward(
    settings: Settings, tokens: Tokens, state: jax.Array, *, keep_states: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Every o_t, the last state, and, to be kept, the states that enter the chunks [b, g, r, chunks, k, v]."""
    plan = _Plan.of(tokens)
    arrays, initial = plan.widened(by_heads(tokens, CHUNK)), plan.widened_state(state)
    states = like(initial, (*initial.shape[:3], plan.num_chunks, *initial.shape[3:]), jnp.float32)
    outputs = (like(arrays.v, arrays.v.shape, arrays.v.dtype), like(initial, initial.shape, jnp.float32),
               states if keep_states else None)
    o, last, states = _launch(
        _forward_kernel, settings, plan, inputs=(arrays, initial), outputs=outputs,
        in_specs=(plan.of_tokens(arrays), plan.of_columns(initial)),
        out_specs=jax.tree.map(plan.of_columns, outputs))
    return token_first(o, tokens.v.shape[1])[..., : state.shape[4]], _narrowed(last, state), states


@functools.partial(jax.jit, static_argnums=0)
def backward(
    settings: Settings, tokens: Tokens, states: jax.Array, do: jax.Array, d_last: jax.Array
) -> tuple[Tokens, jax.Array]:
    """The gradients of the tokens and of the state that enters the first."""
    plan = _Plan.of(tokens)
    arrays, at_end = plan.widened(by_heads(tokens, CHUNK)), plan.widened_state(d_last)
    do = _padded(head_first(do, CHUNK), arrays.v.shape[4])
    gradients = plan.of_each_tile(gradients_of(arrays, tokens.v.shape[3]))
    gradients, d_state = _launch(
        _backward_kernel, settings, plan, inputs=(arrays, states, do, at_end),
        outputs=(gradients, like(at_end, at_end.shape, jnp.float32)),
        in_specs=(plan.of_tokens(arrays), *map(plan.of_columns, (states, do, at_end))),
        out_specs=(plan.of_gradients(gradients), plan.of_columns(at_end)))
    shared = jax.tree.map(lambda x: jnp.sum(x, axis=3), gradients._replace(v=None))
    return summed(shared._replace(v=gradients.v), tokens), _narrowed(d_state, d_last)


class _Plan(NamedTuple):
    """How heads are shared out among programs."""

    heads: tuple[int, int, int]  # b, g, r
    num_chunks: int
    key_width: int               # with zeros beside the real ones, as num_tiles * tile
    num_tiles: int
    tile: int                    # columns of a state

    @classmethod
    def of(cls, tokens: Tokens) -> "_Plan":
        batch, length, groups, in_group, width = tokens.v.shape
        tile = min(TILE, _power(width))
        return cls((batch, groups, in_group), pl.cdiv(length, CHUNK), _power(tokens.k.shape[-1]),
                   pl.cdiv(width, tile), tile)

    def widened(self, arrays: Tokens) -> Tokens:
        """With zeros, which change no product; those of log decays are of channels that hold nothing."""
        wide = jax.tree.map(
            lambda x: x if x.ndim == 6 else _padded(x, self.key_width), arrays._replace(v=None))
        return wide._replace(v=_padded(arrays.v, self.num_tiles * self.tile))

    def widened_state(self, state: jax.Array) -> jax.Array:
        state = jnp.pad(state, (*((0, 0),) * 3, (0, self.key_width - state.shape[3]), (0, 0)))
        return _padded(state, self.num_tiles * self.tile)

    def of_each_tile(self, gradients: Tokens) -> Tokens:
        """Of what all tiles read [b, g, r, tiles, ...], float32 if there is something to add up."""
        def of(x):
            dtype = jnp.float32 if self.num_tiles > 1 else x.dtype
            return jax.ShapeDtypeStruct((*x.shape[:3], self.num_tiles, *x.shape[3:]), dtype,
                                        manual_axis_type=x.manual_axis_type)

        return jax.tree.map(of, gradients._replace(v=None))._replace(v=gradients.v)

    def of_columns(self, x: Any) -> pl.BlockSpec:
        """Of x [b, g, r, ..., v]: the columns of a tile."""
        return pl.BlockSpec((None, None, None, *x.shape[3:-1], self.tile),
                            lambda b, g, r, tile: (b, g, r, *(0,) * (len(x.shape) - 4), tile))

    def of_tokens(self, arrays: Tokens) -> Tokens:
        """Of arrays [b, g, r, ...], where r is 1 if heads share: what all tiles read, and columns of v."""
        def of(x):
            is_shared = x.shape[2] < self.heads[2]
            return pl.BlockSpec((None, None, None, *x.shape[3:]),
                                lambda b, g, r, tile: (b, g, 0 if is_shared else r, *(0,) * (x.ndim - 3)))

        return jax.tree.map(of, arrays)._replace(v=self.of_columns(arrays.v))

    def of_gradients(self, gradients: Tokens) -> Tokens:
        """As `of_each_tile` has them."""
        def of(x):
            return pl.BlockSpec((None, None, None, None, *x.shape[4:]),
                                lambda b, g, r, tile: (b, g, r, tile, *(0,) * (len(x.shape) - 4)))

        return jax.tree.map(of, gradients)._replace(v=self.of_columns(gradients.v))


def _forward_kernel(settings: Settings, plan: _Plan, tokens: Tokens, initial, o, last, states):
    def turn(i, state):
        if states is not None:
            states[i] = state
        # By `vjp`, as Triton has a rule for what that makes of a function with a gradient of its own.
        (state, o_chunk), _ = jax.vjp(functools.partial(_chunk, settings), state, _read(tokens, i))
        o[_rows(i), :] = o_chunk.astype(o.dtype)
        return state

    last[...] = lax.fori_loop(0, plan.num_chunks, turn, initial[...])


def _backward_kernel(settings: Settings, plan: _Plan, tokens: Tokens, states, do, d_last, gradients, d_state):
    def turn(step, d_after):
        i = plan.num_chunks - 1 - step
        _, pull_back = jax.vjp(functools.partial(_chunk, settings), states[i], _read(tokens, i))
        d_before, of_chunk = pull_back((d_after, do[_rows(i), :].astype(jnp.float32)))
        for ref, gradient in zip(jax.tree.leaves(gradients), jax.tree.leaves(of_chunk), strict=True):
            ref[_place(ref, i)] = gradient.astype(ref.dtype)
        return d_before

    d_state[...] = lax.fori_loop(0, plan.num_chunks, turn, d_last[...])


def _chunk(settings: Settings, state: jax.Array, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    return one_chunk(settings, state, tokens, TileDecays.of)


def _read(tokens: Tokens, i: jax.Array) -> Tokens:
    return jax.tree.map(lambda ref: ref[_place(ref, i)].astype(jnp.float32), tokens)


def _place(ref: Any, i: jax.Array) -> Any:
    """Where the i-th chunk is: in rows of a chunk each [chunks, 1, c], or of a token [chunks * c, width]."""
    return i if len(ref.shape) == 3 else (_rows(i), slice(None))


def _rows(i: jax.Array) -> pl.Slice:
    return pl.ds(i * CHUNK, CHUNK)


def _launch(
    kernel: Callable, settings: Settings, plan: _Plan, *, inputs: Any, outputs: Any, in_specs: Any, out_specs: Any
) -> Any:
    """Runs a kernel, which is called with what is in inputs and outputs; returns what it made of outputs."""
    arrays, structure = jax.tree.flatten(inputs)
    out_shape, out_structure = jax.tree.flatten(outputs)

    def body(*refs):
        with contextlib.nullcontext() if settings.interpret else exact_matmuls_as(THREE_TF32):
            kernel(settings, plan, *jax.tree.unflatten(structure, refs[: len(arrays)]),
                   *jax.tree.unflatten(out_structure, refs[len(arrays):]))

    results = pl.pallas_call(
        body, grid=(*plan.heads, plan.num_tiles), in_specs=jax.tree.leaves(in_specs),
        out_specs=jax.tree.leaves(out_specs), out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        name=f"matrix_recurrence{kernel.__name__.removesuffix('_kernel')}", interpret=settings.interpret,
    )(*arrays)
    return jax.tree.unflatten(out_structure, results)


def _narrowed(state: jax.Array, like_this: jax.Array) -> jax.Array:
    return state[..., : like_this.shape[3], : like_this.shape[4]]


def _padded(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, width - x.shape[-1])))


def _power(width: int) -> int:
    return max(SMALLEST, pl.next_power_of_2(width))
