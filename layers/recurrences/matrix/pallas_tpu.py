"""The matrix recurrence for TPU: a head's chunks of tokens in order, and the state between them in vector memory.

What happens within a chunk is `one_chunk`, of one head. The backward pass goes through the chunks from the last to
the first: from the state that entered each, which the forward pass writes down for it, it computes the chunk again
and its gradient, and hands the gradient of that state to the chunk before.
"""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from layers.recurrences.matrix.by_heads import by_heads, gradients_of, head_first, like, summed, token_first
from layers.recurrences.matrix.chunkwise import one_chunk
from layers.recurrences.matrix.tile_decays import TileDecays
from layers.recurrences.matrix.tokens import Settings, Tokens

CHUNK = 64  # tokens; more fill a matrix unit better, and take less memory for states
ROWS = 16   # of a tile of bfloat16: a chunk has whole ones
MAX_KEY_WIDTH, MAX_STATE = 512, 512 * 256  # numbers for which the gradient has room
VECTOR_MEMORY_BYTES = 48 * 2**20           # of 64 MiB or more


def unsupported(tokens: Tokens) -> str | None:
    """Why the kernel cannot run such a call; None if it can."""
    for name, x in tokens._asdict().items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype.name}; float32 and bfloat16 fit"
    key_width, value_width = tokens.k.shape[-1], tokens.v.shape[-1]
    if key_width > MAX_KEY_WIDTH or key_width * value_width > MAX_STATE:
        return (f"a state of {key_width} x {value_width} is too large for vector memory; {MAX_STATE} numbers fit, "
                f"and keys of {MAX_KEY_WIDTH}")
    return None


@functools.partial(jax.jit, static_argnums=0, static_argnames="keep_states")
def forward(
    settings: Settings, tokens: Tokens, state: jax.Array, *, keep_states: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Every o_t, the last state, and, to be kept, the states that enter the chunks [b, g, r, chunks, k, v]."""
    blocks = _Blocks.of(tokens, backwards=False)
    arrays = by_heads(tokens, blocks.chunk)
    states = like(state, (*state.shape[:3], blocks.num_chunks, *state.shape[3:]), jnp.float32)
    results = _launch(
        _forward_kernel, settings, blocks, of_chunks=arrays, of_heads=state,
        results_of_chunks=(like(arrays.v, arrays.v.shape, arrays.v.dtype), states if keep_states else None))
    (o, states), last = results
    return token_first(o, tokens.v.shape[1]), last, states


@functools.partial(jax.jit, static_argnums=0)
def backward(
    settings: Settings, tokens: Tokens, states: jax.Array, do: jax.Array, d_last: jax.Array
) -> tuple[Tokens, jax.Array]:
    """The gradients of the tokens and of the state that enters the first."""
    blocks = _Blocks.of(tokens, backwards=True)
    arrays = by_heads(tokens, blocks.chunk)
    gradients, d_state = _launch(
        _backward_kernel, settings, blocks, of_chunks=(arrays, states, head_first(do, blocks.chunk)),
        of_heads=d_last, results_of_chunks=gradients_of(arrays, tokens.v.shape[3]))
    return summed(gradients, tokens), d_state


class _Blocks(NamedTuple):
    """How arrays are cut, and in which order the chunks of a head are visited."""

    grid: tuple[int, int, int, int]  # b, g, r, chunks
    chunk: int                       # tokens
    backwards: bool

    @classmethod
    def of(cls, tokens: Tokens, *, backwards: bool) -> "_Blocks":
        batch, length, groups, in_group = tokens.v.shape[:4]
        chunk = min(CHUNK, pl.cdiv(length, ROWS) * ROWS)
        return cls((batch, groups, in_group, pl.cdiv(length, chunk)), chunk, backwards)

    @property
    def num_chunks(self) -> int:
        return self.grid[3]

    def of_chunk(self, x: jax.Array) -> pl.BlockSpec:
        """Of x [b, g, r, tokens, width], or [b, g, r, chunks, ...]; r is 1 where heads share."""
        is_shared = x.shape[2] < self.grid[2]

        def index_map(b, g, r, i):
            i = self.num_chunks - 1 - i if self.backwards else i
            return b, g, 0 if is_shared else r, i, *(0,) * (x.ndim - 4)

        rows = self.chunk if x.ndim == 5 else None
        return pl.BlockSpec((None, None, None, rows, *x.shape[4:]), index_map)

    def of_head(self, x: jax.Array) -> pl.BlockSpec:
        """Of a state [b, g, r, k, v]."""
        return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, g, r, i: (b, g, r, 0, 0))


def _forward_kernel(settings: Settings, tokens: Tokens, initial, results, carry):
    o, states = results
    _begin(carry, initial)
    state = carry[...]
    if states is not None:
        states[...] = state
    carry[...], o_chunk = _chunk(settings, state, _read(tokens))
    o[...] = o_chunk.astype(o.dtype)


def _backward_kernel(settings: Settings, inputs, d_last, gradients: Tokens, carry):
    tokens, state, do = inputs
    _begin(carry, d_last)
    _, pull_back = jax.vjp(functools.partial(_chunk, settings), state[...], _read(tokens))
    carry[...], of_chunk = pull_back((carry[...], do[...].astype(jnp.float32)))
    for ref, gradient in zip(jax.tree.leaves(gradients), jax.tree.leaves(of_chunk), strict=True):
        ref[...] = gradient.astype(ref.dtype)


def _chunk(settings: Settings, state: jax.Array, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    return one_chunk(settings, state, tokens, TileDecays.of)


def _begin(carry, first) -> None:
    """The state between chunks is that result which stays in vector memory until the last of a head is done."""
    @pl.when(pl.program_id(3) == 0)
    def _():
        carry[...] = first[...]


def _read(refs: Any) -> Any:
    return jax.tree.map(lambda ref: ref[...].astype(jnp.float32), refs)


def _launch(
    kernel: Callable, settings: Settings, blocks: _Blocks, *, of_chunks: Any, of_heads: jax.Array,
    results_of_chunks: Any,
) -> tuple[Any, jax.Array]:
    """Runs a kernel that reads and writes a pytree of chunks, and makes of the state it is given another one."""
    inputs, structure = jax.tree.flatten(of_chunks)
    outputs, out_structure = jax.tree.flatten(results_of_chunks)

    def body(*refs):
        read, first = jax.tree.unflatten(structure, refs[: len(inputs)]), refs[len(inputs)]
        *written, carry = refs[len(inputs) + 1:]
        kernel(settings, read, first, jax.tree.unflatten(out_structure, written), carry)

    out_shape = [*outputs, like(of_heads, of_heads.shape, jnp.float32)]
    arrays = [*inputs, of_heads]
    *results, last = pl.pallas_call(
        body, grid=blocks.grid, in_specs=[*map(blocks.of_chunk, inputs), blocks.of_head(of_heads)],
        out_specs=[*map(blocks.of_chunk, outputs), blocks.of_head(of_heads)], out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VECTOR_MEMORY_BYTES),
        name=f"matrix_recurrence{kernel.__name__.removesuffix('_kernel')}", interpret=settings.interpret,
    )(*arrays)
    return jax.tree.unflatten(out_structure, results), last
