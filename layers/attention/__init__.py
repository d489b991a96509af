"""Attention: who may see whom, dense and block-sparse, and the patterns built on it.

  mask           which keys a query may see
  attend         dense attention
  block_lists    which blocks of keys a block of queries reads
  block_sparse/  attention over block lists: reference, XLA, TPU and GPU kernels
  patterns       sliding windows, documents, BigBird, dilated
  moba           blocks chosen by the mean of their keys
  paged          a decoding step over pages of a shared cache
  native_sparse  native sparse attention
"""
