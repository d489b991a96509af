"""Native sparse attention: summaries of all blocks, a few blocks in full, a window, and gates; op and layer."""
import math
from typing import Any

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, typed
from layers.attention.block_lists import BlockLists
from layers.attention.block_sparse import block_sparse_attention
from layers.attention.mask_spec import MaskSpec
from layers.attention.moba import best, selected_blocks_attention
from layers.attention.patterns import sliding_window_attention


@typed
def native_sparse_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    compressed_k: Float[Array, "b c n k"], compressed_v: Float[Array, "b c n v"], gates: Float[Array, "b t h 3"],
    *, num_selected: int, window: int, block: int = 64, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """gates[0] * attention to summaries + gates[1] * to selected blocks + gates[2] * to a window.

    NSA, arXiv 2502.11089, eqs. 5-12. Each of c = floor(t / block) summaries stands for a block of keys, seen once
    all of it has passed. Query heads that share keys share a choice: the first block, their own, the one before,
    and those with the most attention to summaries, `num_selected` in all. The choice has no gradient. One row is
    one sequence.
    """
    batch, length, num_heads, width = q.shape
    num_summaries, num_groups = compressed_k.shape[1], num_heads // k.shape[2]
    if num_summaries != length // block:
        raise ValueError(f"{num_summaries} summaries; {length} tokens in blocks of {block} make {length // block}")
    if num_selected < 3:
        raise ValueError(
            f"num_selected {num_selected} must be at least 3: the first block, a token's own, and the one before")
    count = -(-length // block)
    last = jnp.broadcast_to((jnp.arange(num_summaries) + 1) * block - 1, (batch, num_summaries))
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    to_summaries = MaskSpec(positions=positions, kv_positions=last)
    blocks = BlockLists.from_mask_spec(to_summaries, length, num_summaries, block_q=block, block_k=block)
    o_summaries, lse = block_sparse_attention(
        q, compressed_k, compressed_v, blocks, mask=to_summaries, return_lse=True, **keywords)

    queries = jax.lax.stop_gradient(q.reshape(batch, length, -1, num_groups, width)).astype(jnp.float32)
    keys = jax.lax.stop_gradient(compressed_k).astype(jnp.float32)
    scores = jnp.einsum("btngk,bcnk->bngtc", queries, keys) / math.sqrt(width)
    lse = jax.lax.stop_gradient(lse).reshape(batch, -1, num_groups, length, 1)
    is_past = last[:, None, None, None] < jnp.arange(length)[:, None] + 1
    attention = jnp.where(is_past, jnp.exp(jnp.where(is_past, scores - lse, 0)), 0)
    importance = jnp.pad(jnp.sum(attention, axis=2), ((0, 0), (0, 0), (0, 0), (0, count - num_summaries)))
    own, block_id = (jnp.arange(length) // block)[:, None], jnp.arange(count)
    always = (block_id == 0) | ((block_id <= own) & (block_id >= own - 1))
    importance = jnp.where(always, jnp.inf, jnp.where(block_id < own, importance, -jnp.inf))
    chosen = best(importance, num_selected)  # [b, n, t, j]
    o_selected = selected_blocks_attention(q, k, v, chosen, block=block, **keywords)
    o_window = sliding_window_attention(q, k, v, window=window, block=block, **keywords)
    branches = jnp.stack([o_summaries, o_selected, o_window], axis=-1)
    return jnp.einsum("bthvi,bthi->bthv", branches, gates.astype(branches.dtype))
