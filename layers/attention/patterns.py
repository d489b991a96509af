"""Ways to choose what attention reads: small functions over `block_sparse_attention`, and a linen layer for them.

Each takes q [b, t, h, k], k and v [b, t, n, k] of the same tokens and `segment_ids` [b, t] (0 = padding; None =
one per row), and returns [b, t, h, v]. All are causal. Other keywords, such as `implementation`, are those of
`block_sparse_attention`.
"""
from typing import Any

import jax.numpy as jnp
import numpy as np

from layers.array_types import Array, Float, Int, typed
from layers.attention.block_lists import BlockLists
from layers.attention.block_sparse import block_sparse_attention
from layers.attention.mask_spec import MaskSpec

Segments = Int[Array, "b t"] | None


@typed
def sliding_window_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, window: int, block: int = 128, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """Token i sees i - window .. i (Longformer, arXiv 2004.05150)."""
    length = q.shape[1]
    blocks = BlockLists.from_mask_spec(MaskSpec(window=window), length, length, block_q=block, block_k=block)
    mask = MaskSpec(window=window, segment_ids=segment_ids)
    return block_sparse_attention(q, k, v, blocks, mask=mask, **keywords)


@typed
def document_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, block: int = 128, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """Token i sees all earlier tokens of its segment: blocks between documents are not even read."""
    length = q.shape[1]
    mask = MaskSpec(segment_ids=segment_ids)
    blocks = BlockLists.from_mask_spec(mask, length, length, block_q=block, block_k=block)
    return block_sparse_attention(q, k, v, blocks, mask=mask, **keywords)


@typed
def big_bird_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, num_near: int = 3, num_global: int = 1, num_random: int = 2, seed: int = 0,
    block: int = 128, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """Blocks see the `num_near` newest, the first `num_global` and `num_random` others: BigBird, arXiv 2007.14062.

    The random blocks are drawn from `seed` once, earlier ones only, and are the same for all rows and heads.
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
    return block_sparse_attention(q, k, v, blocks, mask=MaskSpec(segment_ids=segment_ids), **keywords)


@typed
def dilated_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, window: int, dilation: int, block: int = 128, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """Token i sees i, i - dilation, i - 2 dilation, .. down to i - window (Longformer, arXiv 2004.05150, 3.1)."""
    if dilation < 1:
        raise ValueError(f"dilation {dilation} must be at least 1, which is a plain window")
    # Tokens of one remainder next to each other see a plain window, of what were `dilation` tokens apart.
    batch, length = q.shape[:2]
    padded = -(-length // dilation) * dilation
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)

    def gathered(x):
        x = jnp.pad(x, [(0, 0), (0, padded - length), *[(0, 0)] * (x.ndim - 2)])
        x = x.reshape(batch, -1, dilation, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(batch * dilation, -1, *x.shape[3:])

    y = sliding_window_attention(
        *map(gathered, (q, k, v, segment_ids)), window=window // dilation, block=block, **keywords)
    y = y.reshape(batch, dilation, -1, *y.shape[2:]).swapaxes(1, 2)
    return y.reshape(batch, padded, *y.shape[3:])[:, :length]
