"""Cutting a sequence into chunks, one vector per chunk, and the way back.

  partition   which token starts which chunk, and which slot the chunk owns
  gather      chunks out of tokens, tokens out of chunks
  smoothing   the moving average over chunks
  ratio_loss  losses that steer the fraction of tokens that start a chunk
  routers     modules that decide where chunks begin
"""
