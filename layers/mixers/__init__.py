"""Linen modules that mix tokens over time; all arithmetic is in `layers/recurrences` and `layers/attention`.

  attention, sparse_attention, native_sparse_attention
  gated_delta_net, gla, griffin, hgrn2, mamba2, min_gru, mlstm, rwkv7, s5
  parts   projections and gates that several of them share
"""
