"""Block-sparse attention as its definition says: dense attention under a mask of the listed pairs."""
import jax
import jax.numpy as jnp

from layers.attention.block_lists import BITS_PER_WORD, BlockLists, is_selected


def listed_pairs(blocks: BlockLists, num_queries: int, num_keys: int) -> jax.Array:
    """Tells which queries read the block of which keys, [b or 1, m, t, s] bool."""
    block_of_query = jnp.arange(num_queries) // blocks.block_q
    block_of_key = jnp.arange(num_keys) // blocks.block_k
    listed = blocks.to_dense()[:, :, block_of_query][..., block_of_key]
    if blocks.rows is None:
        return listed
    words = blocks.rows[:, :, block_of_key // BITS_PER_WORD].swapaxes(-1, -2)  # [b, m, t, s]
    return listed & is_selected(words, block_of_key)
