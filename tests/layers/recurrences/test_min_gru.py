"""minGRU against the official vectors and HGRN's gate, and the states they are continued from."""
import jax
import jax.numpy as jnp
import numpy as np

from layers import MinGRU, hgrn
from tests.support.assertions import assert_matches
from tests.support.carried_state import HALF, assert_state_is_carried
from tests.support.golden_cases import assert_golden_case, golden_case
from tests.support.inputs import Draw


def test_min_gru_is_that_of_the_official_vectors():
    def run(x):
        hidden, gate = jnp.split(x["to_hidden_and_gate__weight"].T, 2, axis=1)
        params = {"hidden_proj": {"kernel": hidden}, "gate_proj": {"kernel": gate},
                  "out": {"kernel": x["to_out__weight"].T}}
        y, state = MinGRU(inner_width=hidden.shape[1]).apply({"params": params}, x["x"])
        return y, state.h

    assert_golden_case(run, golden_case("rec_mingru", "c2"), "x to_hidden_and_gate__weight to_out__weight", "o ht")


def test_the_state_of_min_gru_is_carried_and_segments_and_padding_keep_apart():
    layer, x = MinGRU(inner_width=8, init_std=1.0), Draw(0)(2, 2 * HALF, 5)
    params = jax.jit(layer.init)(jax.random.key(0), x)

    def run(x, segment_ids, state):
        return layer.apply(params, x, segment_ids, state)

    assert_state_is_carried(run, x, layer.empty_state(2, 5))


def test_hgrn_averages_its_inputs_and_is_carried():
    draw = Draw(1)
    i, log_decay = draw(2, 2 * HALF, 5), -(draw.uniform(2, 2 * HALF, 5) ** 4)

    def run(x, segment_ids, state):
        return hgrn(*x, initial_state=state, segment_ids=segment_ids)

    assert_state_is_carried(run, (i, log_decay), jnp.zeros((2, 5)))
    h, decay = np.zeros((2, 5)), np.exp(np.asarray(log_decay, np.float64))
    for step in range(2 * HALF):
        exact = np.asarray(i[:, step], np.float64)
        h = decay[:, step] * h + (1 - decay[:, step]) * exact / (1 + np.exp(-exact))
    assert_matches(jax.jit(hgrn)(i, log_decay)[1], h, dtype="float32")
