import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import rms_norm
from tests.support.assertions import assert_matches
from tests.support.inputs import Draw


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_scales_to_unit_mean_square_in_float32(dtype):
    x = (100 * Draw(0)(3, 7, 64)).astype(dtype)
    scale = jnp.linspace(0.5, 2, 64)
    exact = np.asarray(x, np.float64)
    expected = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-5) * np.asarray(scale, np.float64)
    y = rms_norm(x, scale)
    assert y.dtype == jnp.dtype(dtype)
    assert_matches(y, expected, dtype=dtype)


def test_rms_norm_of_zeros_has_a_finite_gradient():
    gradient = jax.grad(lambda x: rms_norm(x, jnp.ones(8)).sum())(jnp.zeros((2, 8)))
    assert np.isfinite(gradient).all()
