"""Attention over lists of blocks that may be traced: one function, several implementations."""
from layers.attention.block_sparse.op import attend_to_blocks

__all__ = ["attend_to_blocks"]
