"""Gated slot attention against the official vectors, its groups of heads, and the slots it is continued from."""
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from layers import SlotState, gated_slot_attention
from tests.support.assertions import assert_matches
from tests.support.carried_state import HALF, assert_state_is_carried
from tests.support.golden_cases import assert_golden_case, golden_case
from tests.support.inputs import Draw


@pytest.mark.parametrize(("case", "implementation"), [("c0", "reference"), ("c1", "chunkwise")])
def test_outputs_states_and_gradients_are_those_of_the_official_vectors(case, implementation):
    def run(x):
        state = SlotState(x["h0_0"], x["h0_1"]) if "h0_0" in x else None
        o, state = gated_slot_attention(*(x[name] for name in ("q", "k", "v", "s", "g")), initial_state=state,
                                        implementation=implementation)
        return o, *state

    assert_golden_case(run, golden_case("rec_gsa", case), "q k v s g h0_0 h0_1", "o ht0 ht1")


def test_slots_are_carried_for_heads_that_share_keys_and_segments_and_padding_keep_apart():
    draw = Draw(0)
    q, k, v = draw(2, 2 * HALF, 1, 4), draw(2, 2 * HALF, 1, 4), draw(2, 2 * HALF, 2, 5)
    log_decay = -draw.uniform(2, 2 * HALF, 2, 3)
    x = (q, k, v, 1 - jnp.exp(log_decay), log_decay)

    repeated = (q.repeat(2, axis=2), k.repeat(2, axis=2), *x[2:])
    recur = partial(gated_slot_attention, implementation="reference")

    def run(x, segment_ids, state):
        return recur(*x, initial_state=state, segment_ids=segment_ids)

    assert_state_is_carried(run, x, SlotState(jnp.zeros((2, 2, 4, 3)), jnp.zeros((2, 2, 3, 5))))
    shared, of_each = jax.jit(lambda x, y: (recur(*x), recur(*y)))(x, repeated)
    assert_matches(shared, of_each, dtype="float32")
