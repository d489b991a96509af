"""The recurrence and its gradient without a kernel, by any scan over [b, t, d]."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from layers.recurrences.diagonal.parts import (
    DiagonalCall,
    Parts,
    conjugate,
    decay,
    gradients,
    real_inputs,
    split,
    to_complex,
)

Scan = Callable[..., tuple[jax.Array, jax.Array]]  # with the signature of `reference.sequential`


def associative(
    x: jax.Array, a: jax.Array, state: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns what `sequential` does, in log t steps of all tokens at once."""
    def compose(earlier, later):
        (a_1, x_1), (a_2, x_2) = earlier, later
        return a_2 * a_1, a_2 * x_1 + x_2

    start, end = (-1, 0) if reverse else (0, -1)
    x = x.at[:, start].add(a[:, start] * state)
    h = jax.lax.associative_scan(compose, (a, x), axis=1, reverse=reverse)[1]
    return h, h[:, end]


def forward(
    scan: Scan, call: DiagonalCall, x: Parts, gate: Parts, state: Parts, marks: jax.Array | None
) -> tuple[Parts, Parts]:
    """Returns every h_t in the dtype of x, at padding too, where it is the state; and the last one, float32."""
    marks = None if marks is None else marks[..., None]
    a = to_complex(decay(call, gate, marks))
    h, last = scan(to_complex(real_inputs(x, marks)), a, to_complex(state), reverse=call.reverse)
    return _cast_like(x, split(h)), split(last)


def backward(
    scan: Scan, call: DiagonalCall, h: Parts, gate: Parts, state: Parts, marks: jax.Array | None,
    dh: Parts, d_last: Parts,
) -> tuple[Parts, Parts, Parts]:
    """Returns the gradients of x, the gate and the state, in the dtypes of h, the gate and the state."""
    marks = None if marks is None else marks[..., None]
    a = conjugate(decay(call, gate, marks))

    def shifted(x: jax.Array, start: jax.Array, *, towards_first: bool) -> jax.Array:
        start = jnp.broadcast_to(start, (x.shape[0], 1, x.shape[2])).astype(x.dtype)
        if towards_first != call.reverse:
            return jnp.concatenate([x[:, 1:], start], axis=1)
        return jnp.concatenate([start, x[:, :-1]], axis=1)

    # g_t = dh_t + a_{t+1} g_{t+1}, which at the last token is dh_t + d_last.
    a_after = shifted(to_complex(a), jnp.ones(()), towards_first=True)
    g, at_first = scan(to_complex(real_inputs(dh, marks)), a_after, to_complex(d_last), reverse=not call.reverse)
    first = -1 if call.reverse else 0
    h_before = tuple(shifted(x.astype(jnp.float32), start[:, None], towards_first=False)
                     for x, start in zip(h, state, strict=True))
    dx, d_gate = gradients(call, split(g), h_before, gate, marks)
    d_state = to_complex(tuple(part[:, first] for part in a)) * at_first
    return _cast_like(h, dx), _cast_like(gate, d_gate), split(d_state)


def _cast_like(parts: Parts, results: Parts) -> Parts:
    return tuple(x.astype(parts[0].dtype) for x in results)
