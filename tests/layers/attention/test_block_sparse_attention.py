"""Every implementation against the dense spec: values, log-sum-exps and gradients."""
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from layers import CAUSAL, SAME_SEGMENT, BlockLists, Window, attend, token_info
from tests.support.assertions import assert_matches
from tests.support.block_sparse_cases import Case, draw_inputs, in_float32, values_and_gradients
from tests.support.inputs import Draw

IMPLEMENTATIONS = {"xla": {}, "pallas_tpu": {"interpret": True}}
CASES = {
    "causal": Case(),
    "one_list_for_all": Case(lists=1, shared_lists=True, causal=False),
    "lists_per_query_head": Case(lists=4, window=20, softcap=5.0, value_width=8),
    "queries_at_the_end": Case(t=40, s=100, offset=60, select=True, heads=8, key_heads=1, lists=1, scale=0.3),
    "segments": Case(segments=True, heads=4, key_heads=4, lists=4, block_q=32, block_k=16),
    "segments_select_softcap": Case(segments=True, select=True, lists=1, softcap=3.0, causal=False),
    "positions_and_a_window_both_ways": Case(positions=True, causal=False, window=30, t=33, s=90),
    "sinks": Case(sinks=True, density=0.3),
    "full_lists": Case(density=1.0, causal=False, t=64, s=64),
    "empty_lists": Case(density=0.0, lists=4),
    "width_64": Case(width=64, value_width=64, t=128, s=128, block_q=64, block_k=64, b=1),
    "width_96": Case(width=96, value_width=128, heads=2, key_heads=1, lists=1, b=1),
    "one_token": Case(t=1, s=1, density=1.0),
    "bfloat16": Case(dtype="bfloat16", t=100, s=100, width=64, value_width=64, segments=True),
    "bfloat16_softcap": Case(dtype="bfloat16", window=40, softcap=10.0, lists=4, value_width=32, width=128),
}


@functools.cache
def _expected(name: str):
    return values_and_gradients(in_float32(draw_inputs(CASES[name])), implementation="reference")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_those_of_the_dense_spec(name, implementation):
    case = CASES[name]
    expected, expected_gradients, sees_nothing = _expected(name)

    actual, gradients, actually_nothing = values_and_gradients(
        draw_inputs(case), implementation=implementation, **IMPLEMENTATIONS[implementation])

    assert actual["o"].dtype == jnp.dtype(case.dtype) and actual["lse"].dtype == jnp.float32
    np.testing.assert_array_equal(actually_nothing, sees_nothing)
    assert_matches(actual, expected, dtype=case.dtype, scale=2 if case.dtype == "float32" else 1)
    assert_matches(gradients, expected_gradients, dtype=case.dtype, scale=2)


def test_queries_that_see_nothing_give_zero_and_take_no_gradient():
    inputs = draw_inputs(CASES["causal"])
    for implementation, keywords in IMPLEMENTATIONS.items():
        (o_and_lse), (dq, *_), sees_nothing = values_and_gradients(
            inputs, implementation=implementation, **keywords)
        blind = np.asarray(sees_nothing).swapaxes(1, 2)  # [b, t, h]
        assert 0 < blind.sum() < blind.size
        assert not np.asarray(o_and_lse["o"])[blind].any() and not np.asarray(dq)[blind].any()


SMALL = Case(b=1, t=40, s=48, heads=2, key_heads=1, lists=2, block_q=8, block_k=8, width=8, value_width=8,
             segments=True, select=True, window=30)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_any_lists_segments_and_choices(implementation, data):
    """One program: only values of the lists and of the mask differ from example to example."""
    inputs = draw_inputs(SMALL, seed=data.draw(st.integers(0, 1000)))
    bits = data.draw(st.lists(st.booleans(), min_size=60, max_size=60))
    block_mask = jnp.asarray(bits).reshape(1, 2, 5, 6)
    inputs = inputs.replace(blocks=BlockLists.from_block_mask(block_mask, block_q=8, block_k=8))
    compiled = values_and_gradients._cache_size()

    expected = values_and_gradients(inputs, implementation="reference")
    actual = values_and_gradients(inputs, implementation=implementation, **IMPLEMENTATIONS[implementation])

    assert values_and_gradients._cache_size() <= compiled + 2
    np.testing.assert_array_equal(actual[2], expected[2])
    for got, want in zip(jax.tree.leaves(actual[:2]), jax.tree.leaves(expected[:2]), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lists_of_all_blocks_give_dense_causal_attention_and_its_gradients(implementation):
    draw = Draw(1)
    q, k, v, do = draw(2, 50, 4, 64), draw(2, 50, 4, 64), draw(2, 50, 4, 64), draw(2, 50, 4, 64)
    mask = CAUSAL & SAME_SEGMENT & Window(30)
    blocks = BlockLists.from_mask(mask, token_info(50), block_q=16, block_k=16)

    def sparse(q, k, v):
        return attend(q, k, v, mask=mask, blocks=blocks, implementation=implementation,
                      **IMPLEMENTATIONS[implementation]).o

    def dense(q, k, v):
        return attend(q, k, v, mask=mask, implementation="reference").o

    def value_and_gradients(attention):
        value, pull_back = jax.vjp(jax.jit(attention), q, k, v)
        return value, pull_back(do)

    assert_matches(value_and_gradients(sparse), value_and_gradients(dense), dtype="float32", scale=2)
