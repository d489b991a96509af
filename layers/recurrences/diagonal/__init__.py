"""A vector state that decays by channel: one function, several implementations."""
from layers.diagonal_recurrence.op import DiagonalImplementation, diagonal_recurrence

__all__ = ["DiagonalImplementation", "diagonal_recurrence"]
