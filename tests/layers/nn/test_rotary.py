import jax.numpy as jnp
import numpy as np
import pytest

from layers import rotary
from tests.support.inputs import Draw

X = Draw(0)(2, 9, 3, 16)
POSITIONS = jnp.broadcast_to(jnp.arange(9), (2, 9))


def test_pairs_feature_j_with_feature_j_plus_half_and_leaves_the_rest():
    y = np.asarray(rotary(X, POSITIONS, width=8))
    x, t, j = np.asarray(X), 5, 3
    angle = t * 10_000.0 ** (-j / 4)
    np.testing.assert_allclose(
        y[:, t, :, j], x[:, t, :, j] * np.cos(angle) - x[:, t, :, j + 4] * np.sin(angle), atol=1e-5)
    np.testing.assert_array_equal(y[..., 8:], x[..., 8:])


def test_scores_depend_on_distance_alone():
    q, k = X[:, :1], X[:, 1:2]

    def score(i, j):
        at = lambda t: jnp.full((2, 1), t)  # noqa: E731
        return jnp.sum(rotary(q, at(i), width=16) * rotary(k, at(j), width=16), -1)

    np.testing.assert_allclose(score(7, 3), score(104, 100), atol=1e-4)


@pytest.mark.parametrize("width", [3, -2, 18])
def test_refuses_a_width_that_does_not_fit_a_head(width):
    with pytest.raises(ValueError, match="even and within the head width 16"):
        rotary(X, POSITIONS, width=width)
