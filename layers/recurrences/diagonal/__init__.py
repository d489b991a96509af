"""A vector state that decays by channel: one function, several implementations."""
from layers.recurrences.diagonal.op import DiagonalImplementation, diagonal_recurrence

__all__ = ["DiagonalImplementation", "diagonal_recurrence"]
