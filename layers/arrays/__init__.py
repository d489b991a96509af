"""Arithmetic on plain arrays that every other folder uses.

  segments   where segments start, and positions inside them
  choose     the highest scores of an axis: top-k, top-p, threshold, groups first
  cost       how a program states the FLOPs of its loops and kernels
  exact      products of matrices in full float32
  dispatch   which implementation of an op runs on which platform, and why not
"""
