"""Arithmetic shared by the implementations, on numbers as tuples of their real parts, with marks of tokens.

Kernels have no complex numbers. A `Parts` is (x,) or (real, imaginary); x, h and the state have as many parts, the
gate as many or one. Arrays of gradients have the same form: the gradient by each part.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layers.recurrences.segment_states import FIRST, PADDING, REAL

Parts = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class DiagonalCall:
    """Static half of a call; equal ones share a compiled program.

    Attributes:
      is_log: the gate is log a.
      reverse: run from the last token to the first.
      implementation: as the caller asked for.
      interpret: False, True, or the parameters of one of Pallas's interpreters.
    """

    is_log: bool
    reverse: bool
    implementation: str
    interpret: Any


def split(x: jax.Array) -> Parts:
    return (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x,)


def to_complex(parts: Parts) -> jax.Array:
    """Joins parts to a complex array, or returns the only part."""
    return parts[0] if len(parts) == 1 else jax.lax.complex(*parts)


def to_float32(parts: Parts) -> Parts:
    return tuple(x.astype(jnp.float32) for x in parts)


def multiply(u: Parts, v: Parts) -> Parts:
    if len(u) == len(v) == 2:
        return u[0] * v[0] - u[1] * v[1], u[0] * v[1] + u[1] * v[0]
    return tuple(x * y for x in u for y in v)


def add(u: Parts, v: Parts) -> Parts:
    return tuple(x + y for x, y in zip(u, v, strict=True))


def conjugate(u: Parts) -> Parts:
    return (u[0], *(-x for x in u[1:]))


def where(mask: jax.Array, u: Parts, value: float) -> Parts:
    """Chooses u, or the real number `value` where the mask is False."""
    return tuple(jnp.where(mask, x, value if i == 0 else 0.0) for i, x in enumerate(u))


def decay(call: DiagonalCall, gate: Parts, marks: jax.Array | None) -> Parts:
    """Returns each token's factor of the state, float32; marks have the shape of the gate or broadcast to it."""
    a = to_float32(gate)
    a = (jnp.exp(a[0]),) if call.is_log else a
    return a if marks is None else where(marks != PADDING, where(marks != FIRST, a, 0.0), 1.0)


def real_inputs(x: Parts, marks: jax.Array | None) -> Parts:
    """Returns the inputs that tokens add to the state, float32; those of padding are 0."""
    return to_float32(x) if marks is None else where(marks != PADDING, to_float32(x), 0.0)


def gradients(call: DiagonalCall, g: Parts, h_before: Parts, gate: Parts, marks: jax.Array | None
              ) -> tuple[Parts, Parts]:
    """Returns the gradients of x and of the gate, float32, from g, the whole gradient of h_t."""
    d_gate = multiply(conjugate(h_before), g)[: len(gate)]  # of a real gate the real part
    if call.is_log:
        d_gate = multiply(decay(call, gate, None), d_gate)
    if marks is None:
        return g, d_gate
    return where(marks != PADDING, g, 0.0), where(marks == REAL, d_gate, 0.0)
