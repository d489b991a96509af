"""The ordinary parts of a network: functions, and thin modules around them.

  linear        a projection whose axes have names
  norms         RMSNorm
  feed_forward  SwiGLU
  rotary        rotary positions
  causal_conv   causal depthwise convolution that stays within segments
"""
