"""Attention: who may see whom, dense and block-sparse, and the patterns built on it.

  attend         attention, for dense, windowed, cached and block-sparse callers
  sharded        the same over a mesh
  attended       its result; branches over disjoint keys merge
  mask           which keys a query may see: masks that compose, and the tokens they read
  bounds         bounds of blocks of tokens, from which masks tell the tiles worth computing
  dense          dense attention: reference, XLA, cuDNN, tokamax
  blockwise      dense attention in blocks of scores, for long prompts on CPUs
  softcap        bounded scores and their slope
  block_lists    which blocks of keys a block of queries reads
  block_sparse/  attention over block lists: XLA, TPU and GPU kernels
  patterns       sliding windows, documents, BigBird, dilated
  moba           blocks chosen by the mean of their keys
  paged          a decoding step over pages of a shared cache
  native_sparse  native sparse attention
"""
