"""Cutting a sequence into chunks, one vector per chunk, and the way back.

  partition   which token starts which chunk, and which slot the chunk owns
  gather      chunks out of tokens, tokens out of chunks
  summary     one vector per chunk from sums over its tokens, at once or piece by piece
  smoothing   the moving average over chunks
  ratio_loss  losses that steer the fraction of tokens that start a chunk
  routers     modules that decide where chunks begin
  chunker     all of these in one call: chunks, unchunk, info = chunker(x)
"""
