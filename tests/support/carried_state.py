"""Laws of states and segments, for any op or layer that runs along a sequence."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.assertions import assert_matches

HALF = 7  # tokens; inputs are twice as long


def assert_state_is_carried(run: Callable, x: Any, empty: Any, *, scale: float = 4) -> None:
    """Asserts that parts equal the whole, packed segments equal separate ones, and padding is inert and reads 0.

    Two programs cover all of it, one of 2 * HALF tokens and one of a single token.

    Args:
      run: (x, segment_ids [b, t], state) -> (y [b, t, ...], state).
      x: a pytree of arrays [b, 2 * HALF, ...].
      empty: the state before the first token.
      scale: multiplies the tolerance.
    """
    run = jax.jit(run)
    batch = jax.tree.leaves(x)[0].shape[0]

    def halves(first, second, state):
        ids = jnp.repeat(jnp.asarray([[first, second]] * batch, jnp.int32), HALF, axis=1)
        y, state = run(x, ids, state)
        for number, part in ((first, y[:, :HALF]), (second, y[:, HALF:])):
            assert number or not np.any(part), "padding does not read 0"
        return (y[:, :HALF], y[:, HALF:]), state

    def step_by_step(start, state):
        outputs, ids = [], jnp.ones((batch, 1), jnp.int32)
        for now in range(start, start + HALF):
            y, state = run(jax.tree.map(lambda z, now=now: z[:, now : now + 1], x), ids, state)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), state

    def check(actual, expected):
        assert_matches(actual, expected, dtype="float32", scale=scale)

    first, state = step_by_step(0, empty)
    second, end = step_by_step(HALF, state)
    check(halves(1, 1, empty), ((first, second), end))
    alone, alone_end = step_by_step(HALF, empty)
    check(halves(1, 2, empty), ((first, alone), alone_end))

    (y, _), after = halves(1, 0, empty)
    check((y, after), (first, state))
    (_, y), after = halves(0, 1, state)
    check((y, after), (second, end))
    check(halves(0, 0, end)[1], end)
