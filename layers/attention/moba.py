"""Mixture of block attention, and attention to blocks that are chosen per token."""
from typing import Any

import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, typed
from layers.attention.block_lists import BlockLists
from layers.attention.block_sparse import block_sparse_attention
from layers.attention.mask_spec import MaskSpec, pack_row_select
from layers.attention.patterns import Segments


@typed
def moba_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, top_k: int, block: int = 128, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """Each token and head sees its own block and the top_k - 1 earlier ones whose mean key fits its query best.

    MoBA, arXiv 2502.13189, eqs. 2-6. The choice has no gradient. Blocks are of the row: a block that holds two
    documents is scored by the mean of both, and read for the keys of the token's own.
    """
    if top_k < 1:
        raise ValueError(f"top_k {top_k} must be at least 1, a token's own block")
    num_groups = q.shape[2] // k.shape[2]
    count = -(-k.shape[1] // block)
    queries = q.reshape(*q.shape[:2], -1, num_groups, q.shape[-1]).astype(jnp.float32)
    scores = jnp.einsum("btngk,bjnk->bngtj", queries, block_means(k, segment_ids, block))
    own = jnp.arange(q.shape[1]) // block
    is_earlier = jnp.arange(count) < own[:, None]
    chosen = best(jnp.where(is_earlier, scores, -jnp.inf), top_k - 1) | (jnp.arange(count) == own[:, None])
    chosen = chosen.reshape(q.shape[0], q.shape[2], *chosen.shape[3:])  # [b, h, t, j]
    return selected_blocks_attention(q, k, v, chosen, segment_ids, block=block, **keywords)


@typed
def selected_blocks_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    chosen: Bool[Array, "b m t j"], segment_ids: Segments = None, *, block: int = 128, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """Each token sees the blocks chosen for it, of keys at or before it; m = 1, n or h choices per token."""
    length, count = q.shape[1], chosen.shape[-1]
    by_block = jnp.pad(chosen, ((0, 0), (0, 0), (0, -length % block), (0, 0)))
    by_block = jnp.any(by_block.reshape(*chosen.shape[:2], -1, block, count), axis=3)
    blocks = BlockLists.from_block_mask(by_block, block_q=block, block_k=block)
    mask = MaskSpec(segment_ids=segment_ids, row_select=pack_row_select(chosen))
    return block_sparse_attention(q, k, v, blocks, mask=mask, **keywords)


@typed
def block_means(x: Float[Array, "b t n k"], segment_ids: Segments, block: int) -> Float[Array, "b j n k"]:
    """The mean over the real tokens of each block, in float32; 0 for a block of padding."""
    is_real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids != 0
    padding = -x.shape[1] % block
    is_real = jnp.pad(is_real, ((0, 0), (0, padding))).reshape(x.shape[0], -1, block, 1, 1)
    blocks = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, padding), (0, 0), (0, 0)))
    blocks = blocks.reshape(x.shape[0], -1, block, *x.shape[2:])
    return jnp.sum(blocks * is_real, axis=2) / jnp.maximum(jnp.sum(is_real, axis=2), 1)


def best(scores: jax.Array, k: int) -> jax.Array:
    """True at the k highest along the last axis, of equals the first ones; never at -inf."""
    k = min(k, scores.shape[-1])
    if k == 0:
        return jnp.zeros(scores.shape, bool)
    _, ids = jax.lax.top_k(scores, k)
    chosen = jnp.any(ids[..., None] == jnp.arange(scores.shape[-1]), axis=-2)
    return chosen & (scores > -jnp.inf)
