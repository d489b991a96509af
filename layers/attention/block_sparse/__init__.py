"""Attention over lists of blocks that may be traced: one function, several implementations."""
from layers.attention.block_sparse.op import (
    block_sparse_attention,
    merge_by_lse,
    sharded_block_sparse_attention,
)

__all__ = ["block_sparse_attention", "merge_by_lse", "sharded_block_sparse_attention"]
