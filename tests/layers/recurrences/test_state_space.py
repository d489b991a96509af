"""S4D and S5 against the official vectors: kernel, recurrence, both directions, first spectrum."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import S5, discretize, hippo_legs, s4d, s4d_kernel, s5
from tests.support.assertions import GOLDEN_POWERS_LIMIT, assert_golden, assert_matches
from tests.support.carried_state import HALF, assert_state_is_carried
from tests.support.golden_cases import assert_golden_case, golden_case
from tests.support.inputs import Draw


def _complex(x, name):
    return jax.lax.complex(x[f"{name}_re"], x[f"{name}_im"])


def test_s4d_and_its_kernel_are_those_of_the_official_vectors():
    data = golden_case("rec_s4d", "c0")

    def run(x):
        c = jax.lax.complex(x["C"][..., 0], x["C"][..., 1])
        params = (x["log_dt"], x["log_A_real"], x["A_imag"], c)
        y, _ = s4d(jnp.swapaxes(x["u"], 1, 2), *params)
        return jnp.swapaxes(y, 1, 2), s4d_kernel(*params, data["kernel"].shape[1])

    data["dkernel"] = np.zeros_like(data["kernel"])
    assert_golden_case(run, data, "u C log_dt log_A_real A_imag", "o kernel", limit=GOLDEN_POWERS_LIMIT)


def test_the_convolution_of_s4d_is_its_recurrence_with_states_in_and_out():
    draw = Draw(3)
    x, initial = draw(2, 19, 4), jax.lax.complex(draw(2, 4, 3), draw(2, 4, 3))
    params = (draw(4) - 2, draw(4, 3) - 1, 3 * draw(4, 3), jax.lax.complex(draw(4, 3), draw(4, 3)))
    run = jax.jit(partial(s4d, initial_state=initial), static_argnames="implementation")
    expected = run(x, *params, implementation="reference")
    assert_matches(run(x, *params, implementation="convolution"), expected, dtype="float32", scale=2)
    with pytest.raises(NotImplementedError, match="one kernel per row and cannot take segment_ids"):
        run(x, *params, implementation="convolution", segment_ids=jnp.ones((2, 19), jnp.int32))


@pytest.mark.parametrize("case", ["c1", "c2"])
def test_s5_is_that_of_the_official_vectors(case):
    def run(x):
        c, c_reverse = _complex(x, "C"), None
        if case == "c2":
            c, c_reverse = jnp.split(c, 2, axis=1)
        y, _ = s5(x["u"][None], _complex(x, "Lambda"), _complex(x, "B"), c, x["D"], jnp.exp(x["log_step"]),
                  c_reverse=c_reverse, discretization="bilinear" if case == "c1" else "zoh")
        return (y[0],)

    names = "u B_re B_im C_re C_im D Lambda_re Lambda_im log_step"
    assert_golden_case(run, golden_case("rec_s5", case), names, limit=GOLDEN_POWERS_LIMIT)


def test_the_first_spectrum_of_s5_is_that_of_hippo():
    data = golden_case("rec_s5", "init")
    index = np.arange(len(data["hippo_lambda"]))
    eigenvalues, vectors = hippo_legs(len(index))
    root = np.sqrt(2 * index + 1)
    assert_golden(eigenvalues, data["hippo_lambda"])
    for ours, theirs in ((vectors, data["hippo_absV"]), (vectors.conj().T @ root, data["hippo_B"]),
                         (vectors.conj().T @ np.sqrt(index + 0.5), data["hippo_P"])):
        assert_golden(np.abs(ours), np.abs(theirs))


def test_a_small_step_keeps_its_digits():
    eigenvalues, step = np.asarray([-0.5 + 3j, -1 + 0.1j]), 1e-6
    _, gain = jax.jit(discretize)(jnp.asarray(eigenvalues, jnp.complex64), jnp.float32(step))
    np.testing.assert_allclose(gain, (np.exp(eigenvalues * step) - 1) / eigenvalues, rtol=1e-6)


def test_the_states_of_s4d_and_s5_are_carried_and_segments_and_padding_keep_apart():
    draw, layer = Draw(0), S5(state_size=8, num_blocks=2, init_std=1.0, out_init_std=1.0)
    x = draw(2, 2 * HALF, 5)
    params = jax.jit(layer.init)(jax.random.key(0), x)
    s4d_params = (draw(5) - 2, draw(5, 3) - 1, 3 * draw(5, 3), jax.lax.complex(draw(5, 3), draw(5, 3)))

    def run(x, segment_ids, states):
        y, state = layer.apply(params, x, segment_ids, states[0])
        other, s4d_state = s4d(x, *s4d_params, initial_state=states[1], segment_ids=segment_ids)
        return jnp.concatenate([y, other], axis=-1), (state, s4d_state)

    assert_state_is_carried(run, x, (layer.empty_state(2, 5), jnp.zeros((2, 5, 3), jnp.complex64)))


def test_what_does_not_fit_is_refused():
    layer, x = S5(state_size=6, bidirectional=True), jnp.zeros((1, 2, 4))
    with pytest.raises(ValueError, match="a bidirectional S5 reads whole sequences"):
        jax.eval_shape(layer.init, jax.random.key(0), x, None, layer.empty_state(1, 4))
    with pytest.raises(ValueError, match="state_size 6 is not a multiple of 2"):
        jax.eval_shape(S5(state_size=6, num_blocks=2).init, jax.random.key(0), x)
