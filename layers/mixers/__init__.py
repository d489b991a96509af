"""Linen modules that mix tokens over time; all arithmetic is in `layers/recurrences` and `layers/attention`.

  gated_delta_net, gla, griffin, hgrn2, mamba2, rwkv7
  parts   projections and gates that several of them share
"""
