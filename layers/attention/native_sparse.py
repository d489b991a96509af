"""Native sparse attention: summaries of all blocks, a few blocks in full, a window, and gates."""
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.array_types import Array, Float, typed
from layers.arrays.choose import choose
from layers.attention.attend import Implementation, attend
from layers.attention.block_lists import BlockLists
from layers.attention.mask import CAUSAL, token_info
from layers.attention.moba import selected_blocks_attention
from layers.attention.patterns import sliding_window_attention


@typed
def native_sparse_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    compressed_k: Float[Array, "b c n k"], compressed_v: Float[Array, "b c n v"], gates: Float[Array, "b t h 3"],
    *, num_selected: int, window: int, block: int = 64, implementation: Implementation = "auto",
    interpret: Any = False,
) -> Float[Array, "b t h v"]:
    """Computes gates[0] * attention to summaries + gates[1] * to selected blocks + gates[2] * to a window.

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
    last = (np.arange(num_summaries, dtype=np.int32) + 1) * block - 1
    tokens, summaries = token_info(length), token_info(num_summaries, positions=last[None])
    o_summaries, lse = attend(
        q, compressed_k, compressed_v, mask=CAUSAL, q_tokens=tokens, kv_tokens=summaries,
        blocks=BlockLists.from_mask(CAUSAL, tokens, summaries, block_q=block, block_k=block),
        implementation=implementation, interpret=interpret)

    queries = jax.lax.stop_gradient(q.reshape(batch, length, -1, num_groups, width)).astype(jnp.float32)
    keys = jax.lax.stop_gradient(compressed_k).astype(jnp.float32)
    scores = jnp.einsum("btngk,bcnk->bngtc", queries, keys) / math.sqrt(width)
    lse = jax.lax.stop_gradient(lse).reshape(batch, -1, num_groups, length, 1)
    is_past = last <= jnp.arange(length)[:, None]
    attention = jnp.where(is_past, jnp.exp(jnp.where(is_past, scores - lse, 0)), 0)
    importance = jnp.pad(jnp.sum(attention, axis=2), ((0, 0), (0, 0), (0, 0), (0, count - num_summaries)))
    own, block_id = (jnp.arange(length) // block)[:, None], jnp.arange(count)
    always = (block_id == 0) | ((block_id <= own) & (block_id >= own - 1))
    chosen = choose(importance, top_k=num_selected, is_forced=always, is_forbidden=block_id > own).is_chosen
    run = dict(block=block, implementation=implementation, interpret=interpret)
    o_selected = selected_blocks_attention(q, k, v, chosen, **run)  # chosen is [b, n, t, j]
    o_window = sliding_window_attention(q, k, v, window=window, **run)
    branches = jnp.stack([o_summaries, o_selected, o_window], axis=-1)
    return jnp.einsum("bthvi,bthi->bthv", branches, gates.astype(branches.dtype))
