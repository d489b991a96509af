"""TTT-linear against the official vectors, by tokens and by mini-batches, and split within a mini-batch."""
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from layers import TTTState, ttt_linear
from tests.support.assertions import assert_matches, golden
from tests.support.carried_state import HALF, assert_state_is_carried
from tests.support.golden_cases import assert_golden_case, golden_case
from tests.support.inputs import Draw


def test_outputs_states_and_gradients_are_those_of_the_official_vectors():
    mini_batch_size = int(re.search(r"mini_batch_size (\d+)", str(golden("rec_ttt_linear")["meta"])).group(1))

    def run(x):
        state = TTTState.start(x["h0_0"], x["h0_1"][:, :, 0])
        o, state = ttt_linear(x["q"], x["k"], x["v"], x["eta"][..., 0], x["w"], x["b"], initial_state=state,
                              mini_batch_size=mini_batch_size)
        return o, state.w, state.b

    names = "q k v eta w b h0_0 h0_1"
    assert_golden_case(run, golden_case("rec_ttt_linear", "c0"), names, "o ht0 ht1")


def _inputs(length):
    draw = Draw(length)
    q, k, v = (draw(2, length, 2, 4) for _ in range(3))
    return (q, k, v, 0.1 * draw.uniform(2, length, 2)), (1 + 0.1 * draw(2, 4), 0.1 * draw(2, 4))


def test_the_state_is_carried_and_segments_and_padding_keep_apart():
    x, norm = _inputs(2 * HALF)

    def run(x, segment_ids, state):
        return ttt_linear(*x, *norm, initial_state=state, segment_ids=segment_ids, mini_batch_size=3)

    assert_state_is_carried(run, x, TTTState.start(jnp.zeros((2, 2, 4, 4)), jnp.zeros((2, 2, 4))))


def test_mini_batches_continue_from_the_middle_of_one_in_every_row():
    (x, norm), draw = _inputs(11), Draw(0)
    state = TTTState(*(0.1 * draw(2, 2, 4, *rest) for rest in ((4,), (), (4,), ())), jnp.asarray([2, 4]))
    run = jax.jit(partial(ttt_linear, mini_batch_size=5), static_argnames="implementation")
    expected = run(*x, *norm, initial_state=state, implementation="reference")
    assert list(expected[1].num_tokens) == [3, 0]
    actual = run(*x, *norm, initial_state=state, implementation="chunkwise")
    assert_matches(actual, expected, dtype="float32", scale=4)
    with pytest.raises(NotImplementedError, match="mini-batches begin with segments; use"):
        run(*x, *norm, segment_ids=jnp.ones((2, 11), jnp.int32), implementation="chunkwise")
