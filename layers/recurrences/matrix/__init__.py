from layers.matrix_recurrence.op import (
    MatrixImplementation,
    decay_per_head,
    matrix_recurrence,
    per_group,
    per_head,
)
from layers.matrix_recurrence.tokens import Tokens

__all__ = ["MatrixImplementation", "Tokens", "decay_per_head", "matrix_recurrence", "per_group", "per_head"]
