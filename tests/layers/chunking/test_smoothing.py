from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import smooth
from tests.support.assertions import assert_matches
from tests.support.inputs import Draw


@pytest.mark.parametrize("c", [1, 7, 64])
def test_associative_smoothing_matches_reference_in_value_and_gradient(c):
    draw = Draw(seed=c)
    z, dy = draw(2, c, 5), draw(2, c, 5)
    p = draw.uniform(2, c).at[:, c // 2].set(1.0).at[:, c // 3].set(0.0)
    restarts = (draw.uniform(2, c) < 0.2).at[:, 0].set(True)

    @partial(jax.jit, static_argnums=0)
    def value_and_gradient(implementation):
        y, vjp = jax.vjp(partial(smooth, restarts=restarts, implementation=implementation), z, p)
        return y, vjp(dy)

    assert_matches(value_and_gradient("associative"), value_and_gradient("reference"), dtype="float32")


def test_smoothing_keeps_the_clamp_of_the_release():
    z = jnp.ones((1, 3, 1))
    y = smooth(z, jnp.array([[1.0, 0.0, 0.5]]), jnp.array([[True, False, False]]), implementation="reference")
    s0 = 1 - 1e-4
    s1 = 1e-4 + s0 * (1 - 1e-4)
    np.testing.assert_allclose(y[0, :, 0], [s0, s1, 0.5 + 0.5 * s1], rtol=1e-6)


def test_what_is_not_real_leaves_the_average_as_it_is():
    draw = Draw(0)
    z, p = draw(1, 7, 2), draw.uniform(1, 7)
    is_real = jnp.array([[True, True, False, True, False, False, True]])
    kept = np.flatnonzero(is_real[0])
    none = jnp.zeros((1, 7), bool)
    with_gaps = smooth(z, p, none, is_real=is_real)
    apart = smooth(z[:, kept], p[:, kept], none[:, kept])
    np.testing.assert_allclose(with_gaps[:, kept], apart, atol=1e-6)
    np.testing.assert_allclose(with_gaps[0, 2], with_gaps[0, 1], atol=1e-7)


def test_rounding_to_bfloat16_is_off_by_a_few_parts_in_a_thousand_and_reset_like_the_exact_one():
    draw = Draw(0)
    z, p = draw(2, 40, 8), 0.5 + draw.uniform(2, 40) / 2
    restarts = jnp.zeros((2, 40), bool).at[:, ::10].set(True)
    exact, rounded = (smooth(z, p, restarts, round_to_bfloat16=flag) for flag in (False, True))
    relative = float(jnp.sqrt(jnp.mean((exact - rounded) ** 2) / jnp.mean(exact**2)))
    assert 5e-4 < relative < 6e-3
    cut = smooth(z[:, 10:], p[:, 10:], restarts[:, 10:], round_to_bfloat16=True)
    np.testing.assert_allclose(rounded[:, 10:], cut, atol=1e-6)
