"""Mixture of block attention, and attention to blocks that are chosen per token."""
from typing import Any

import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, typed
from layers.arrays.choose import choose
from layers.attention.attend import Implementation, attend
from layers.attention.block_lists import BlockLists
from layers.attention.mask import token_info
from layers.attention.patterns import Segments
from layers.chunking.partition import Partition
from layers.chunking.summary import summarize


@typed
def moba_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, top_k: int, block: int = 128,
    implementation: Implementation = "auto", interpret: Any = False,
) -> Float[Array, "b t h v"]:
    """Attends to a token's own block and the top_k - 1 earlier ones whose mean key fits its query best, per head.

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
    chosen = choose(scores, top_k=top_k - 1, is_forbidden=~is_earlier).is_chosen
    chosen |= jnp.arange(count) == own[:, None]
    chosen = chosen.reshape(q.shape[0], q.shape[2], *chosen.shape[3:])  # [b, h, t, j]
    return selected_blocks_attention(
        q, k, v, chosen, segment_ids, block=block, implementation=implementation, interpret=interpret)


@typed
def selected_blocks_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    chosen: Bool[Array, "b m t j"], segment_ids: Segments = None, *, block: int = 128,
    implementation: Implementation = "auto", interpret: Any = False,
) -> Float[Array, "b t h v"]:
    """Attends to the blocks chosen for each token, at keys no later than it; m = 1, n or h choices per token."""
    blocks = BlockLists.from_query_mask(chosen, block_q=block, block_k=block)
    return attend(q, k, v, q_tokens=token_info(q.shape[1], segment_ids=segment_ids), blocks=blocks,
                  implementation=implementation, interpret=interpret).o


@typed
def block_means(x: Float[Array, "b t n k"], segment_ids: Segments, block: int) -> Float[Array, "b j n k"]:
    """Averages the real tokens of each block, in float32; a block of padding gives 0."""
    segment_ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    return summarize(x, Partition.blocks(segment_ids, block), "mean")
