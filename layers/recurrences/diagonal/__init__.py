"""One op for all vector states h_t = a_t h_{t-1} + x_t that decay by channel.

  op                       the function and its gradient, and which implementation runs
  reference                the spec, token by token
  xla                      forward and backward over any scan, and the associative one
  parts                    complex numbers as tuples of real parts, and marks of tokens
  pallas_tpu, pallas_gpu   the kernels
"""
from layers.recurrences.diagonal.op import DiagonalImplementation, diagonal_recurrence

__all__ = ["DiagonalImplementation", "diagonal_recurrence"]
