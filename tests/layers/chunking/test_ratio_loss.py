import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import ratio_loss
from tests.support.inputs import Draw


def test_ratio_loss_is_one_at_its_target_and_counts_real_tokens_only():
    p = jnp.array([[1, 0.0, 0.0, 0.0] * 2])
    mask = jnp.ones((1, 8), bool)
    np.testing.assert_allclose(ratio_loss(p, p > 0.5, mask, 4.0), 1.0, rtol=1e-6)
    padded = ratio_loss(jnp.pad(p, ((0, 0), (0, 8))), jnp.pad(p > 0.5, ((0, 0), (0, 8))),
                        jnp.pad(mask, ((0, 0), (0, 8))), 4.0)
    np.testing.assert_allclose(padded, 1.0, rtol=1e-6)
    assert ratio_loss(p, p > 0.5, mask, 8.0) > 1


def test_ratio_loss_pushes_probabilities_by_the_realised_fraction():
    """d loss / d G = N (N F - 1) / (N - 1): up when there are too few boundaries, and none through F."""
    p = jnp.array([[1, 0.2, 0.3, 0.4, 0.2, 0.1, 0.3, 0.2]])
    gradient = jax.grad(lambda p: ratio_loss(p, p > 0.5, jnp.ones((1, 8), bool), 4.0))(p)
    np.testing.assert_allclose(gradient, np.full((1, 8), 4 * (4 / 8 - 1) / 3 / 8), rtol=1e-5)


def test_the_hinge_costs_only_more_boundaries_than_the_target_and_pushes_probabilities_down():
    mask = jnp.ones((1, 8), bool)
    p = jnp.array([[1, 0.6, 0.1, 0.7, 0.2, 0.9, 0.3, 0.1]])  # F = 1/2

    def hinge(target):
        return jax.value_and_grad(lambda p: ratio_loss(p, p > 0.5, mask, target, objective="hinge"))(p)

    value, gradient = hinge(4.0)
    np.testing.assert_allclose(value, 4 / 2 - 1)
    np.testing.assert_allclose(gradient, np.full((1, 8), 4 / 8))
    value, gradient = hinge(1.5)
    assert value == 0 and (gradient == 0).all()


def test_without_an_objective_there_is_neither_loss_nor_gradient():
    p = Draw(0).uniform(2, 8)
    value, gradient = jax.value_and_grad(
        lambda p: ratio_loss(p, p > 0.5, jnp.ones((2, 8), bool), 4.0, objective="none"))(p)
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("objective", ["hnet", "hinge"])
def test_groups_of_rows_have_statistics_of_their_own(objective):
    p, mask = Draw(0).uniform(4, 9), Draw(1).uniform(4, 9) < 0.8

    def loss(rows, num_groups=1):
        return ratio_loss(p[rows], p[rows] > 0.5, mask[rows], 3.0, objective=objective, num_groups=num_groups)

    apart = (loss(slice(0, 2)) + loss(slice(2, 4))) / 2
    np.testing.assert_allclose(loss(slice(None), 2), apart, rtol=1e-6)
    assert abs(loss(slice(None)) - apart) > 1e-4
    with pytest.raises(ValueError, match="4 rows do not divide into 3 groups"):
        loss(slice(None), 3)


def test_the_target_may_be_traced():
    p, mask = Draw(0).uniform(2, 8), jnp.ones((2, 8), bool)
    compiled = jax.jit(lambda target: ratio_loss(p, p > 0.5, mask, target))
    for target in (2.0, 6.0):
        np.testing.assert_allclose(compiled(target), ratio_loss(p, p > 0.5, mask, target), rtol=1e-6)
    assert compiled._cache_size() == 1
