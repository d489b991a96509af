"""mLSTM against the official vectors; its running maximum, its range, and the memory it is continued from."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import MLSTM, MLSTMMemory, mlstm
from layers.recurrences.log_decay import NOTHING_LEFT
from layers.recurrences.running_max import _associative, _sequential, fading_max_before
from tests.support.assertions import GOLDEN_QUOTIENT_LIMIT
from tests.support.carried_state import HALF, assert_state_is_carried
from tests.support.golden_cases import assert_golden_case, golden_case
from tests.support.inputs import Draw


def _run(x, **options):
    state = None
    if "h0_0" in x:
        state = MLSTMMemory(x["h0_0"], x["h0_1"], x["h0_2"][..., 0])
    h, memory = mlstm(x["q"], x["k"], x["v"], x["i"], x["f"], initial_state=state, **options)
    return h, *memory


@pytest.mark.parametrize(("case", "implementation"), [("c0", "reference"), ("c1", "chunkwise")])
def test_exponential_gates_are_those_of_the_official_vectors(case, implementation):
    run, data = partial(_run, implementation=implementation), golden_case("rec_mlstm", case)
    assert_golden_case(run, data, "q k v i f h0_0 h0_1 h0_2", "o ht0 ht1 ht2", limit=GOLDEN_QUOTIENT_LIMIT)


def test_sigmoid_gates_are_those_of_the_official_vectors():
    data = golden_case("rec_mlstm", "c2")
    run = partial(_run, input_activation="sigmoid", implementation="reference")
    assert_golden_case(lambda x: run(x)[:1], data, "q k v i f")


def test_the_running_maximum_is_one_of_its_two_forms():
    draw = Draw(1)
    x, f, initial = 10 * draw(2, 37, 3), -(draw(2, 37, 3) ** 2), draw(2, 3)
    f, x = f.at[0, 5].set(NOTHING_LEFT), x.at[1, 7].set(NOTHING_LEFT)
    np.testing.assert_allclose(
        jax.jit(_associative)(x, f, initial), jax.jit(_sequential)(x, f, initial), rtol=1e-5, atol=1e-5)


def _tokens(length):
    draw = Draw(length)
    x = {"q": draw(2, length, 1, 4), "k": draw(2, length, 1, 4), "v": draw(2, length, 2, 5)}
    return x | {"i": 3 * draw(2, length, 2), "f": 3 * draw(2, length, 2)}


def test_each_segment_may_have_a_maximum_of_its_own_and_padding_leaves_it_alone():
    draw, ids = Draw(2), jnp.asarray([[0, 3, 3, 3, 3, 0, 5, 5, 5]], jnp.int32)
    x, f, initial = draw(1, 9, 2), -draw.uniform(1, 9, 2), draw(1, 3, 2)
    before, last = jax.jit(fading_max_before)(x, f, initial, segment_ids=ids)
    for number, start, stop in ((0, 1, 5), (1, 6, 9)):
        m = np.asarray(initial[0, number])
        for token in range(start, stop):
            np.testing.assert_array_equal(before[0, token], m)
            m = np.maximum(m + f[0, token], x[0, token])
        np.testing.assert_array_equal(last[0, number], m)
    np.testing.assert_array_equal(last[0, 2], initial[0, 2])


def test_gates_beyond_the_range_of_an_exponential_leave_outputs_and_gradients_finite():
    @jax.jit
    def values_and_gradients(x):
        h, pull_back = jax.vjp(lambda x: _run(x, implementation="reference")[0], x)
        return h, pull_back(jnp.ones_like(h))

    for gate in (-300.0, 300.0):
        x = _tokens(9) | {"i": jnp.full((2, 9, 2), gate), "f": jnp.full((2, 9, 2), gate)}
        h, gradients = values_and_gradients(x)
        assert all(np.isfinite(z).all() for z in jax.tree.leaves((h, gradients)))
        assert h.any() == (gate > 0)  # with both gates shut nothing is written


def test_the_layer_carries_its_memory_and_segments_and_padding_keep_apart():
    layer = MLSTM(state_size=3, expand=2, head_width=5, input_gate_bias=0.0, init_std=0.5, out_init_std=0.5)
    x = Draw(0)(2, 2 * HALF, 5)
    params = jax.jit(layer.init)(jax.random.key(0), x)

    def run(x, segment_ids, memory):
        return layer.apply(params, x, segment_ids, memory)

    assert_state_is_carried(run, x, layer.empty_state(2, 5), scale=16)
    with pytest.raises(ValueError, match="expand \\* width = 10 is not a multiple of head_width 4"):
        MLSTM(expand=2, head_width=4).empty_state(1, 5)
