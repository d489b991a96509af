"""What the implementations share: numbers as tuples of their real parts, with marks of tokens.

Kernels have no complex numbers. A `Parts` is (x,) or (real, imaginary); x, h and the state have as many parts, the
gate as many or one. Arrays of gradients are of the same form: the part of each part.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layers.recurrences.segment_states import FIRST, PADDING, REAL

Parts = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static half of a call; equal settings share a compiled program."""

    is_log: bool     # the gate is log a
    reverse: bool
    implementation: str
    interpret: Any   # False, True, or the parameters of one of Pallas's interpreters


def split(x: jax.Array) -> Parts:
    return (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x,)


def joined(parts: Parts) -> jax.Array:
    return parts[0] if len(parts) == 1 else jax.lax.complex(*parts)


def wide(parts: Parts) -> Parts:
    return tuple(x.astype(jnp.float32) for x in parts)


def times(u: Parts, v: Parts) -> Parts:
    if len(u) == len(v) == 2:
        return u[0] * v[0] - u[1] * v[1], u[0] * v[1] + u[1] * v[0]
    return tuple(x * y for x in u for y in v)


def plus(u: Parts, v: Parts) -> Parts:
    return tuple(x + y for x, y in zip(u, v, strict=True))


def conjugate(u: Parts) -> Parts:
    return (u[0], *(-x for x in u[1:]))


def where(mask: jax.Array, u: Parts, value: float) -> Parts:
    """u, or the real number `value` where the mask is False."""
    return tuple(jnp.where(mask, x, value if i == 0 else 0.0) for i, x in enumerate(u))


def decay(settings: Settings, gate: Parts, marks: jax.Array | None) -> Parts:
    """What each token multiplies the state by, float32; marks have the shape of the gate, or spread over it."""
    a = wide(gate)
    a = (jnp.exp(a[0]),) if settings.is_log else a
    return a if marks is None else where(marks != PADDING, where(marks != FIRST, a, 0.0), 1.0)


def added(x: Parts, marks: jax.Array | None) -> Parts:
    """What each token adds to the state, float32."""
    return wide(x) if marks is None else where(marks != PADDING, wide(x), 0.0)


def gradients(settings: Settings, g: Parts, h_before: Parts, gate: Parts, marks: jax.Array | None
              ) -> tuple[Parts, Parts]:
    """Of x and of the gate, float32, from g = dh_t: what h_t itself and all that follows from it pull on it."""
    d_gate = times(conjugate(h_before), g)[: len(gate)]  # of a real gate the real part
    if settings.is_log:
        d_gate = times(decay(settings, gate, None), d_gate)
    if marks is None:
        return g, d_gate
    return where(marks != PADDING, g, 0.0), where(marks == REAL, d_gate, 0.0)
