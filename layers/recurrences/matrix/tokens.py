"""What a step of a matrix recurrence reads and writes, and how."""
from typing import Any, NamedTuple

import jax


class Tokens(NamedTuple):
    """Arrays [b, t, g, r, width] of g groups of r heads; r is 1 where the heads of a group share.

    The delta rule has an `a`, and erases with the key it writes; a `b` beside it makes the transition one of
    diagonal plus low rank. The equations are in op.py.
    """

    q: jax.Array                # width k
    k: jax.Array                # width k
    v: jax.Array                # width v, no head shared
    log_decay: jax.Array        # width 1 or k; float32
    a: jax.Array | None = None  # width k
    b: jax.Array | None = None  # width k


class Settings(NamedTuple):
    """What is the same for all tokens."""

    scale: float = 1.0             # of o
    reads_before: bool = False     # o_t reads S_{t-1}, before it decays
    chunk_size: int | None = None  # tokens per step of the form by chunks; None = as many as suit a CPU
    interpret: Any = False         # of a kernel: False, True, or the parameters of one of Pallas's interpreters
