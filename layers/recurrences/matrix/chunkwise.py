"""The matrix recurrence by chunks of tokens: matmuls within a chunk, and one state from each to the next.

The delta rule writes values that depend on what it reads: inside a chunk that is a triangular system (the WY form,
arXiv 2406.06484; with two matrices, arXiv 2503.14456).
"""
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from layers.recurrences.matrix.decays import Decays, Matmul, exact_matmul, rounded_matmul
from layers.recurrences.matrix.step_inputs import MatrixCall, StepInputs
from layers.recurrences.matrix.triangular import unit_lower_inverse

HEAD_DECAY_CHUNK, CHANNEL_DECAY_CHUNK = 32, 16  # tokens per chunk, by the kind of decay


def chunkwise(call: MatrixCall, inputs: StepInputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scans over chunks, each recomputed in the backward pass; returns what `reference.sequential` does."""
    chunk_size = call.chunk_size
    length = inputs.v.shape[1]
    if chunk_size is None:
        chunk_size = HEAD_DECAY_CHUNK if inputs.log_decay.shape[-1] == 1 else CHANNEL_DECAY_CHUNK
    size = min(length, chunk_size)

    def split(x):  # [b, t, n, r, w] -> [chunks, b, n, r, size, w]; zeros are inert
        x = jnp.pad(x, ((0, 0), (0, -length % size), *((0, 0),) * 3))
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2), (0, 4))

    body = jax.checkpoint(partial(one_chunk, call), prevent_cse=False)
    state, o = jax.lax.scan(body, state, jax.tree.map(split, inputs))
    o = jnp.moveaxis(o, (0, 4), (1, 2))  # [b, chunks, size, n, r, v]
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length], state


def one_chunk(
    call: MatrixCall, state: jax.Array, chunk: StepInputs,
    make_decays: Callable[..., Decays] = Decays.from_log_decay, exact: Matmul = exact_matmul,
) -> tuple[jax.Array, jax.Array]:
    """Advances the state [..., k, v] over one chunk of inputs [..., c, width]; returns it and o [..., c, v].

    Inputs that come rounded to bfloat16 are multiplied as the device does it by default. Sums of log decays, and
    the triangle, whose inverse would magnify a rounding, are float32 always.

    Args:
      make_decays: makes `Decays` in the form that the caller's compiler can take.
      exact: multiplies in float32, asked for in a way that the caller's compiler understands.
    """
    matmul = exact if chunk.v.dtype == jnp.float32 else rounded_matmul
    q, k, v, log_decay, a, b = (None if x is None else x.astype(jnp.float32) for x in chunk)
    decays = make_decays(log_decay, exact, before=call.reads_before)
    keys, values = [k], [v]
    if b is not None:
        before = make_decays(log_decay, exact, before=True)
        found = before.query(a, state, matmul) + matmul(before.pairs(a, k, matmul), v)
        keys.append(b)
        values.append(exact(unit_lower_inverse(-before.pairs(a, b, exact), exact), found))
    elif a is not None:
        inverse = unit_lower_inverse(decays.pairs(a, k, exact), exact)
        values = [exact(inverse, v - decays.query(a, state, matmul))]

    o, after = decays.query(q, state, matmul), decays.decay_state(state)
    for key, value in zip(keys, values, strict=True):
        o = o + matmul(decays.pairs(q, key, matmul, own=not call.reads_before), value)
        after = after + decays.accumulate(key, value, matmul)
    return after, (call.scale * o).astype(chunk.v.dtype)
