"""Linear attention and retention against the official vectors, and the states they can be continued from."""
import jax.numpy as jnp
import numpy as np

from layers import LinearAttentionState, linear_attention, retention, retention_log_decay
from tests.support.carried_state import HALF, assert_state_is_carried
from tests.support.golden_cases import assert_golden_case, golden_case
from tests.support.inputs import Draw


def test_retention_is_that_of_the_official_vectors():
    def run(x):
        return retention(x["q"], x["k"], x["v"], implementation="reference")[:1]

    assert_golden_case(run, golden_case("rec_retnet", "c1"), "q k v")


def test_rates_of_retention_stay_apart_where_float32_would_round_them_to_one():
    log_decay = retention_log_decay(40)
    np.testing.assert_allclose(log_decay[25:], -(2.0 ** -np.arange(30, 45)), rtol=1e-6)
    assert np.all(np.diff(log_decay) > 0) and log_decay[0] == np.float32(np.log(31 / 32))


def test_linear_attention_is_that_of_the_official_vectors():
    def plain(x):
        state = LinearAttentionState(x["h0"], jnp.zeros(x["h0"].shape[:-1]))
        o, state = linear_attention(x["q"], x["k"], x["v"], normalize=False, initial_state=state,
                                    implementation="reference")
        return o, state.kv

    def normalized(x):
        o, state = linear_attention(x["q"], x["k"], x["v"], normalize=True)
        return o, state.kv, state.k

    assert_golden_case(plain, golden_case("rec_linear_attn", "c0"), "q k v h0", "o ht")
    assert_golden_case(normalized, golden_case("rec_linear_attn", "c1"), "q k v", "o ht0 ht1")


def test_the_sum_of_weights_is_carried_and_segments_and_padding_keep_apart():
    draw = Draw(0)
    x = (draw.uniform(2, 2 * HALF, 1, 4), draw.uniform(2, 2 * HALF, 1, 4), draw(2, 2 * HALF, 3, 5))

    def run(x, segment_ids, state):
        return linear_attention(*x, normalize=True, initial_state=state, segment_ids=segment_ids,
                                implementation="reference")

    assert_state_is_carried(run, x, LinearAttentionState(jnp.zeros((2, 3, 4, 5)), jnp.zeros((2, 3, 4))))
