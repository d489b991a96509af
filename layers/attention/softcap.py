"""Soft caps: scores bent so that they stay within a bound, and the slope of the bend for backward passes."""
from collections.abc import Callable

import jax
import jax.numpy as jnp


def softcap(scores: jax.Array, cap: float | None) -> tuple[jax.Array, jax.Array | float]:
    """Returns cap * tanh(scores / cap) and its derivative; the scores and 1 without a cap."""
    if cap is None:
        return scores, 1.0
    bent, slope = bend(scores / cap)
    return cap * bent, slope


def bend(x: jax.Array, tanh: Callable[[jax.Array], jax.Array] = jnp.tanh) -> tuple[jax.Array, jax.Array]:
    """Returns tanh(x) and its derivative; a kernel may bring a `tanh` of its own."""
    bent = tanh(x)
    return bent, 1 - bent * bent
