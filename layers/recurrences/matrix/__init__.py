from layers.recurrences.matrix.op import (
    MatrixImplementation,
    decay_per_head,
    matrix_recurrence,
    per_group,
    per_head,
)
from layers.recurrences.matrix.tokens import Tokens

__all__ = ["MatrixImplementation", "Tokens", "decay_per_head", "matrix_recurrence", "per_group", "per_head"]
