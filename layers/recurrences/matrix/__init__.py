"""One op for all matrix states S_t = decay S_{t-1} + k v^T and their delta rules.

  op                       which implementation runs, segments, states, shards of time
  step_inputs              the arrays that a step reads, and the static half of a call
  reference                the spec, token by token
  chunkwise                by chunks of tokens: decays, tile_decays, triangular
  pallas_tpu, pallas_gpu   the kernels; kernel_layout has the layout of their arrays
"""
from layers.recurrences.matrix.op import MatrixImplementation, matrix_recurrence
from layers.recurrences.matrix.step_inputs import StepInputs, add_shared_axis, group_decays, group_heads

__all__ = ["MatrixImplementation", "StepInputs", "add_shared_axis", "group_decays", "group_heads",
           "matrix_recurrence"]
