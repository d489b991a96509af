"""Fixed choices of what attention reads: small functions over `attend`.

Each takes q [b, t, h, k], k and v [b, t, n, k] of the same tokens and `segment_ids` [b, t] (0 = padding; None =
one per row), and returns [b, t, h, v]. All are causal. `implementation` and `interpret` are those of `attend`.
"""
from typing import Any

import jax.numpy as jnp
import numpy as np

from layers.array_types import Array, Float, Int, typed
from layers.attention.attend import Implementation, attend
from layers.attention.block_lists import BlockLists
from layers.attention.mask import CAUSAL, SAME_SEGMENT, Window, token_info

Segments = Int[Array, "b t"] | None


@typed
def sliding_window_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, window: int, block: int = 128,
    implementation: Implementation = "auto", interpret: Any = False,
) -> Float[Array, "b t h v"]:
    """Attends from token i to i - window .. i (Longformer, arXiv 2004.05150)."""
    length, mask = q.shape[1], CAUSAL & SAME_SEGMENT & Window(window)
    # From positions alone, which are known beforehand: these lists are short.
    blocks = BlockLists.from_mask(mask, token_info(length), block_q=block, block_k=block)
    return attend(q, k, v, mask=mask, q_tokens=token_info(length, segment_ids=segment_ids), blocks=blocks,
                  implementation=implementation, interpret=interpret).o


@typed
def document_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, block: int = 128,
    implementation: Implementation = "auto", interpret: Any = False,
) -> Float[Array, "b t h v"]:
    """Attends from token i to all earlier tokens of its segment: blocks between documents are not even read."""
    tokens = token_info(q.shape[1], segment_ids=segment_ids)
    blocks = BlockLists.from_mask(CAUSAL & SAME_SEGMENT, tokens, block_q=block, block_k=block)
    return attend(q, k, v, q_tokens=tokens, blocks=blocks, implementation=implementation, interpret=interpret).o


@typed
def big_bird_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, num_near: int = 3, num_global: int = 1, num_random: int = 2, seed: int = 0,
    block: int = 128,
    implementation: Implementation = "auto", interpret: Any = False,
) -> Float[Array, "b t h v"]:
    """Attends to the `num_near` newest blocks, the first `num_global` and `num_random` others.

    BigBird, arXiv 2007.14062. The random blocks are drawn from `seed` once, earlier ones only, and are the same
    for all rows and heads.
    """
    count = -(-q.shape[1] // block)
    i, j = np.arange(count)[:, None], np.arange(count)[None]
    wanted = ((i - j < num_near) | (j < num_global)) & (j <= i)
    rng = np.random.default_rng(seed)
    for row in range(count):
        others = np.flatnonzero(~wanted[row, :row])
        wanted[row, rng.permutation(others)[:num_random]] = True
    blocks = BlockLists.from_block_mask(
        jnp.asarray(wanted[None, None]), block_q=block, block_k=block, max_blocks=int(wanted.sum(axis=1).max()))
    return attend(q, k, v, q_tokens=token_info(q.shape[1], segment_ids=segment_ids), blocks=blocks,
                  implementation=implementation, interpret=interpret).o


@typed
def dilated_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, window: int, dilation: int, block: int = 128,
    implementation: Implementation = "auto", interpret: Any = False,
) -> Float[Array, "b t h v"]:
    """Attends from token i to i, i - dilation, i - 2 dilation, .. down to i - window (arXiv 2004.05150, 3.1)."""
    if dilation < 1:
        raise ValueError(f"dilation {dilation} must be at least 1, which is a plain window")
    # Tokens that are `dilation` apart become neighbours, which see a plain window.
    batch, length = q.shape[:2]
    padded = -(-length // dilation) * dilation
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)

    def gather(x):
        x = jnp.pad(x, [(0, 0), (0, padded - length), *[(0, 0)] * (x.ndim - 2)])
        x = x.reshape(batch, -1, dilation, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(batch * dilation, -1, *x.shape[3:])

    y = sliding_window_attention(
        *map(gather, (q, k, v, segment_ids)), window=window // dilation, block=block,
        implementation=implementation, interpret=interpret)
    y = y.reshape(batch, dilation, -1, *y.shape[2:]).swapaxes(1, 2)
    return y.reshape(batch, padded, *y.shape[3:])[:, :length]
