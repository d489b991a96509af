"""The matrix recurrence by chunks of tokens: matmuls within a chunk, and one state from each to the next.

What the delta rule writes depends on what it reads: inside a chunk that is a triangular system (the WY form,
arXiv 2406.06484; with two matrices, arXiv 2503.14456).
"""
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from layers.recurrences.matrix.decays import Decays, exact_matmul, rounded_matmul
from layers.recurrences.matrix.tokens import Settings, Tokens
from layers.recurrences.matrix.triangular import unit_lower_inverse

CHUNK_OF_HEADS, CHUNK_OF_CHANNELS = 32, 16  # tokens, by what decays


def chunkwise(tokens: Tokens, state: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """A scan over chunks, which its backward pass computes again; see `reference.sequential`."""
    chunk_size = settings.chunk_size
    length = tokens.v.shape[1]
    if chunk_size is None:
        chunk_size = CHUNK_OF_HEADS if tokens.log_decay.shape[-1] == 1 else CHUNK_OF_CHANNELS
    size = min(length, chunk_size)

    def chunks(x):  # [b, t, g, r, w] -> [chunks, b, g, r, size, w]; zeros are inert
        x = jnp.pad(x, ((0, 0), (0, -length % size), *((0, 0),) * 3))
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2), (0, 4))

    body = jax.checkpoint(partial(one_chunk, settings), prevent_cse=False)
    state, o = jax.lax.scan(body, state, jax.tree.map(chunks, tokens))
    o = jnp.moveaxis(o, (0, 4), (1, 2))  # [b, chunks, size, g, r, v]
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length], state


def one_chunk(
    settings: Settings, state: jax.Array, chunk: Tokens, decays_of: Callable[..., Decays] = Decays.of
) -> tuple[jax.Array, jax.Array]:
    """Advances the state [..., k, v] over one chunk of tokens [..., c, width]; returns it and o [..., c, v].

    Tokens that come rounded to bfloat16 are multiplied as the device does it by default. Sums of log decays, and
    the triangle, whose inverse would magnify a rounding, are float32 always.
    """
    matmul = exact_matmul if chunk.v.dtype == jnp.float32 else rounded_matmul
    q, k, v, log_decay, a, b = (None if x is None else x.astype(jnp.float32) for x in chunk)
    decays = decays_of(log_decay, before=settings.reads_before)
    keys, values = [k], [v]
    if b is not None:
        before = decays_of(log_decay, before=True)
        found = before.read(a, state, matmul) + matmul(before.pairs(a, k, matmul=matmul), v)
        keys.append(b)
        values.append(exact_matmul(unit_lower_inverse(-before.pairs(a, b)), found))
    elif a is not None:
        values = [exact_matmul(unit_lower_inverse(decays.pairs(a, k)), v - decays.read(a, state, matmul))]

    o, after = decays.read(q, state, matmul), decays.kept(state)
    for key, value in zip(keys, values, strict=True):
        o = o + matmul(decays.pairs(q, key, own=not settings.reads_before, matmul=matmul), value)
        after = after + decays.written(key, value, matmul)
    return after, (settings.scale * o).astype(chunk.v.dtype)
