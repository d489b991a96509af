"""The recurrence and its gradient without a kernel, by any scan over [b, t, d]."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from layers.recurrences.diagonal.parts import Parts, Settings, added, conjugate, decay, gradients, joined, split

Scan = Callable[..., tuple[jax.Array, jax.Array]]  # as `sequential` of the reference


def associative(
    x: jax.Array, a: jax.Array, state: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """As `sequential`, in log t steps of all tokens at once."""
    def compose(earlier, later):
        (a_1, x_1), (a_2, x_2) = earlier, later
        return a_2 * a_1, a_2 * x_1 + x_2

    start, end = (-1, 0) if reverse else (0, -1)
    x = x.at[:, start].add(a[:, start] * state)
    h = jax.lax.associative_scan(compose, (a, x), axis=1, reverse=reverse)[1]
    return h, h[:, end]


def forward(
    scan: Scan, settings: Settings, x: Parts, gate: Parts, state: Parts, marks: jax.Array | None
) -> tuple[Parts, Parts]:
    """Every h_t in the dtype of x, also at padding, where it is the state; and the last one, float32."""
    marks = None if marks is None else marks[..., None]
    a = joined(decay(settings, gate, marks))
    h, last = scan(joined(added(x, marks)), a, joined(state), reverse=settings.reverse)
    return _like(x, split(h)), split(last)


def backward(
    scan: Scan, settings: Settings, h: Parts, gate: Parts, state: Parts, marks: jax.Array | None,
    dh: Parts, d_last: Parts,
) -> tuple[Parts, Parts, Parts]:
    """The gradients of x, the gate and the state, in the dtypes of h, the gate and the state."""
    marks = None if marks is None else marks[..., None]
    a = conjugate(decay(settings, gate, marks))

    def shifted(x: jax.Array, start: jax.Array, *, towards_first: bool) -> jax.Array:
        start = jnp.broadcast_to(start, (x.shape[0], 1, x.shape[2])).astype(x.dtype)
        if towards_first != settings.reverse:
            return jnp.concatenate([x[:, 1:], start], axis=1)
        return jnp.concatenate([start, x[:, :-1]], axis=1)

    # g_t = dh_t + a_{t+1} g_{t+1}, which at the last token is dh_t + d_last.
    a_after = shifted(joined(a), jnp.ones(()), towards_first=True)
    g, at_first = scan(joined(added(dh, marks)), a_after, joined(d_last), reverse=not settings.reverse)
    first = -1 if settings.reverse else 0
    h_before = tuple(shifted(x.astype(jnp.float32), start[:, None], towards_first=False)
                     for x, start in zip(h, state, strict=True))
    dx, d_gate = gradients(settings, split(g), h_before, gate, marks)
    d_state = joined(tuple(part[:, first] for part in a)) * at_first
    return _like(h, dx), _like(gate, d_gate), split(d_state)


def _like(parts: Parts, results: Parts) -> Parts:
    return tuple(x.astype(parts[0].dtype) for x in results)
