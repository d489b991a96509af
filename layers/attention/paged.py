"""Attention of a decoding step to pages of a shared cache."""
from typing import Any

from layers.array_types import Array, Float, Int, typed
from layers.attention.attend import Implementation, attend
from layers.attention.block_lists import BlockLists
from layers.attention.mask import CAUSAL, token_info


@typed
def paged_attention(
    q: Float[Array, "b h k"], k_pages: Float[Array, "p s n k"], v_pages: Float[Array, "p s n v"],
    page_table: Int[Array, "b l"], lengths: Int[Array, "b"], page_positions: Int[Array, "p s"],
    *, implementation: Implementation = "auto", interpret: Any = False,
) -> Float[Array, "b h v"]:
    """Attends from one query per row to pages of a cache that all rows share: a decoding step.

    Args:
      page_table: the pages of each row, in any order; a row may share pages with another.
      lengths: tokens of each row that are in the cache, the newest of which is the query's own; its pages are the
        first ceil(length / s) of its row in the table.
      page_positions: position in its row of the token in each slot; slots past a row's length are not read.
    """
    num_pages, page = k_pages.shape[:2]
    blocks = BlockLists.from_ids(
        -(-lengths // page)[None, None], page_table[None, None], block_q=1, block_k=page, num_key_blocks=num_pages)
    k, v = (pages.reshape(1, num_pages * page, *pages.shape[2:]) for pages in (k_pages, v_pages))
    return attend(
        q[None], k, v, mask=CAUSAL, q_tokens=token_info(q.shape[0], positions=lengths[None] - 1),
        kv_tokens=token_info(num_pages * page, positions=page_positions.reshape(1, -1)), blocks=blocks,
        implementation=implementation, interpret=interpret).o[0]
