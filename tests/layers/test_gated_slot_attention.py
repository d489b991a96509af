"""Gated slot attention against the official vectors, its groups of heads, and the slots it is continued from."""
import jax
import jax.numpy as jnp
import pytest

from layers import SlotState, gated_slot_attention
from tests.assertions import assert_matches
from tests.carried_state import HALF, assert_state_is_carried
from tests.golden_cases import assert_golden_case, golden_case
from tests.inputs import Draw


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_outputs_states_and_gradients_are_those_of_the_official_vectors(case):
    def run(x):
        state = SlotState(x["h0_0"], x["h0_1"]) if "h0_0" in x else None
        o, state = gated_slot_attention(*(x[name] for name in ("q", "k", "v", "s", "g")), initial_state=state)
        return o, *state

    assert_golden_case(run, golden_case("rec_gsa", case), "q k v s g h0_0 h0_1", "o ht0 ht1")


def test_slots_are_carried_for_heads_that_share_keys_and_segments_and_padding_keep_apart():
    draw = Draw(0)
    q, k, v, log_decay = draw(2, 14, 1, 4), draw(2, 14, 1, 4), draw(2, 14, 2, 5), -draw.uniform(2, 14, 2, 3)
    x = (q, k, v, 1 - jnp.exp(log_decay), log_decay)

    def run(x, segment_ids, state):
        return gated_slot_attention(*x, initial_state=state, segment_ids=segment_ids)

    empty = SlotState(jnp.zeros((2, 2, 4, 3)), jnp.zeros((2, 2, 3, 5)))
    assert x[0].shape[1] == 2 * HALF
    assert_state_is_carried(run, x, empty)
    repeated = (q.repeat(2, axis=2), k.repeat(2, axis=2), *x[2:])
    assert_matches(jax.jit(gated_slot_attention)(*repeated), jax.jit(gated_slot_attention)(*x), dtype="float32")
