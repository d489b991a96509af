"""Per-token inputs of a matrix recurrence, and the static half of a call."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class StepInputs(NamedTuple):
    """Arrays [b, t, n, r, width]: n key heads, each for r value heads; r is 1 where those share.

    The delta rule has an `a` and erases with the key that it writes; a `b` besides makes the transition diagonal
    plus low rank. The equations are in op.py.
    """

    q: jax.Array                # width k
    k: jax.Array                # width k
    v: jax.Array                # width v, never shared
    log_decay: jax.Array        # width 1 or k; float32
    a: jax.Array | None = None  # width k
    b: jax.Array | None = None  # width k


class MatrixCall(NamedTuple):
    """Static half of a call; equal ones share a compiled program."""

    scale: float = 1.0             # factor of o
    reads_before: bool = False     # o_t reads S_{t-1}, before it decays
    chunk_size: int | None = None  # tokens per step of the chunkwise form; None picks a size tuned for CPU
    interpret: Any = False         # for kernels: False, True, or the parameters of one of Pallas's interpreters


def add_shared_axis(x: jax.Array, v: jax.Array, name: str) -> jax.Array:
    """[b, t, n, k] -> [b, t, n, 1, k]: queries or keys that the value heads of v share."""
    if v.shape[2] % x.shape[2]:
        raise ValueError(f"{name} has {x.shape[2]} heads, which must divide the {v.shape[2]} of v; arrays are "
                         "time first, [b, t, heads, width]")
    return x[:, :, :, None]


def group_heads(x: jax.Array, num_key_heads: int) -> jax.Array:
    """[b, t, h, width] -> [b, t, n, h / n, width]."""
    return x.reshape(*x.shape[:2], num_key_heads, -1, x.shape[-1])


def group_decays(log_decay: jax.Array | None, v: jax.Array, num_key_heads: int) -> jax.Array:
    """[b, t, h] or [b, t, h, k] -> [b, t, n, h / n, 1 or k] float32; zeros for None."""
    if log_decay is None:
        log_decay = jnp.zeros(v.shape[:3], jnp.float32)
    log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
    return group_heads(log_decay.astype(jnp.float32), num_key_heads)
