"""What a state and segments promise, of any op or layer that runs along a sequence."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.assertions import assert_matches

HALF = 7  # tokens; inputs are twice as long, so that two programs and that of one token do for everything


def assert_state_is_carried(run: Callable, x: Any, empty: Any, *, scale: float = 4, steps: int = 2) -> None:
    """A sequence in parts equals the whole; segments in a row equal those alone; padding is inert and reads 0.

    Args:
      run: (x, segment_ids [b, t], state) -> (y [b, t, ...], state).
      x: a pytree of arrays [b, 2 * HALF, ...].
      empty: the state before the first token.
      scale: of the tolerance.
      steps: tokens to read one by one.
    """
    run = jax.jit(run)
    batch = jax.tree.leaves(x)[0].shape[0]

    def part(start, stop):
        return jax.tree.map(lambda z: z[:, start:stop], x)

    def ids(first, second):
        return jnp.repeat(jnp.asarray([[first, second]] * batch, jnp.int32), HALF, axis=1)

    def check(actual, expected):
        assert_matches(actual, expected, dtype="float32", scale=scale)

    one_half = ids(1, 1)[:, :HALF]
    earlier, later = part(0, HALF), part(HALF, 2 * HALF)
    whole, last = run(x, ids(1, 1), empty)
    first, state = run(earlier, one_half, empty)
    second, end = run(later, one_half, state)
    check((jnp.concatenate([first, second], axis=1), end), (whole, last))
    for token in range(HALF, HALF + steps):
        y, state = run(part(token, token + 1), one_half[:, :1], state)
        check(y[:, 0], whole[:, token])

    _, state = run(earlier, one_half, empty)
    alone, end = run(later, one_half, empty)
    check(run(x, ids(1, 2), empty), (jnp.concatenate([first, alone], axis=1), end))
    for order, expected in (((0, 1), (alone, end)), ((1, 0), (first, state))):
        y, after = run(x, ids(*order), empty)
        real = HALF * order[1]
        check((y[:, real : real + HALF], after), expected)
        assert not np.any(y[:, HALF - real : 2 * HALF - real]), "padding does not read 0"
    check(run(earlier, 0 * one_half, end)[1], end)
