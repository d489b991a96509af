"""Properties that hold for any weights: causality, independence of rows and segments, exactness of capacity."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet import HNetConfig
from tests.support.assertions import SAME_COMPUTATION, assert_golden
from tests.support.models import clear_tokens, compiled, random_params, two_stage_config

T = 40
CONFIG = two_stage_config()
PARAMS = random_params(CONFIG)
ONES = np.ones((3, T), np.int32)
TOKENS = clear_tokens(CONFIG, PARAMS, ONES)


def _run(tokens, segment_ids, config=CONFIG):
    return compiled(config)(PARAMS, tokens, segment_ids)


def _same(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=SAME_COMPUTATION)


def test_the_drawn_model_chunks_at_every_stage():
    """Or the tests below would show nothing."""
    output = _run(TOKENS, ONES)
    for stage in output.stages.values():
        rate = stage.metrics()["boundary_rate"]
        assert 0.2 < rate < 0.8, rate


def test_changing_a_later_byte_changes_no_earlier_logit_or_boundary():
    before = _run(TOKENS, ONES)
    for position in (1, 17, T - 1):
        changed = TOKENS.copy()
        changed[:, position] = (changed[:, position] + 1) % CONFIG.vocab_size
        after = _run(changed, ONES)
        _same(after.logits[:, :position], before.logits[:, :position])
        assert np.abs(after.logits[:, position] - before.logits[:, position]).max() > 1e-2
        masks = [np.asarray(output.stages["stage0"].boundary_mask)[:, :position] for output in (before, after)]
        np.testing.assert_array_equal(*masks)
        num_chunks = masks[0].sum(1)
        inner = [np.asarray(output.stages["stage1"].boundary_mask) for output in (before, after)]
        for row, count in enumerate(num_chunks):
            np.testing.assert_array_equal(inner[0][row, :count], inner[1][row, :count])


def test_packed_segments_equal_separate_rows():
    """Lengths 1 and up, with padding before, between and after."""
    lengths = (1, 7, 12, 9)
    segment_ids, tokens = np.zeros((3, T), np.int32), np.zeros((3, T), np.int32)
    start = 2
    for number, length in enumerate(lengths, start=1):
        segment_ids[0, start : start + length] = 10 * number
        tokens[:, start : start + length] = TOKENS[number % 3, :length]
        start += length + (number == 2)  # a gap after the second
    packed = _run(tokens, segment_ids)
    stage = packed.stages["stage0"]
    for number, length in enumerate(lengths, start=1):
        apart_ids = np.zeros((3, T), np.int32)
        apart_ids[0, :length] = 1
        apart = _run(np.tile(TOKENS[number % 3], (3, 1)), apart_ids)
        where = segment_ids[0] == 10 * number
        _same(packed.logits[0, where], apart.logits[0, :length])
        np.testing.assert_array_equal(
            stage.boundary_mask[0, where], apart.stages["stage0"].boundary_mask[0, :length])


def test_what_stands_in_padding_changes_nothing():
    segment_ids = ONES.copy()
    segment_ids[0, :5] = segment_ids[1, 30:] = segment_ids[2, :] = 0
    noise = np.where(segment_ids == 0, (TOKENS + 3) % CONFIG.vocab_size, TOKENS)
    one, other = _run(TOKENS, segment_ids), _run(noise, segment_ids)
    real = segment_ids != 0
    _same(np.asarray(one.logits)[real], np.asarray(other.logits)[real])
    for name in one.stages:
        np.testing.assert_array_equal(one.stages[name].boundary_mask, other.stages[name].boundary_mask)
        assert one.stages[name].ratio_loss(4.0) == other.stages[name].ratio_loss(4.0)


def test_padding_and_empty_rows_give_finite_gradients():
    segment_ids = ONES.copy()
    segment_ids[0, :5] = segment_ids[2, :] = 0

    def loss(params):
        output = compiled(CONFIG)(params, TOKENS, segment_ids)
        return jnp.sum(jnp.where((segment_ids != 0)[..., None], output.logits, 0) ** 2) + sum(
            stage.ratio_loss(4.0) for stage in output.stages.values())

    gradient = jax.jit(jax.grad(loss))(PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_permuting_rows_permutes_outputs():
    order = np.array([2, 0, 1])
    straight, permuted = _run(TOKENS, ONES), _run(TOKENS[order], ONES)
    _same(permuted.logits, np.asarray(straight.logits)[order])
    for name, stage in straight.stages.items():
        np.testing.assert_array_equal(permuted.stages[name].boundary_mask, np.asarray(stage.boundary_mask)[order])


def test_full_capacity_equals_any_capacity_that_does_not_overflow():
    full = _run(TOKENS, ONES)
    needed = max(float(stage.boundary_mask.sum(1).max()) / stage.is_real.shape[1]
                 for stage in full.stages.values())
    tight = _run(TOKENS, ONES, CONFIG.with_chunking(capacity=min(needed + 1 / T, 1.0)))
    for name, stage in tight.stages.items():
        assert stage.num_slots < full.stages[name].num_slots and (np.asarray(stage.num_overflow) == 0).all()
    _same(tight.logits, full.logits)


def test_overflow_is_counted_and_demotes_causally():
    config = CONFIG.with_chunking(capacity=0.2)
    output, full = _run(TOKENS, ONES, config), _run(TOKENS, ONES)
    stage = output.stages["stage0"]
    count = np.asarray(full.stages["stage0"].boundary_mask).sum(1)
    np.testing.assert_array_equal(stage.num_overflow, np.maximum(count - stage.num_slots, 0))
    assert stage.metrics()["overflow_boundaries"] > 0
    # The reported mask and F are those before the cut.
    np.testing.assert_array_equal(stage.boundary_mask, full.stages["stage0"].boundary_mask)
    last = (TOKENS + (np.arange(T) == T - 1)) % CONFIG.vocab_size
    _same(_run(last, ONES, config).logits[:, :-1], output.logits[:, :-1])


@pytest.mark.parametrize("remat", ["dots", "block"])
def test_gradients_do_not_depend_on_rematerialisation(remat):
    stored = HNetConfig(stages=(dataclasses.replace(CONFIG.stages[1], encoder="T2", decoder=""),), vocab_size=61)
    params = random_params(stored)

    def gradient(config):
        loss = lambda params: jnp.mean(compiled(config)(params, TOKENS, ONES).logits ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    assert_golden(gradient(stored.with_stack(remat=remat)), gradient(stored))


def test_a_bfloat16_model_has_float32_logits_and_probabilities():
    output = _run(TOKENS, ONES, dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert output.logits.dtype == jnp.float32 and np.isfinite(output.logits).all()
    assert output.stages["stage0"].boundary_prob.dtype == jnp.float32
    # Boundaries may flip, so later logits may differ; the first token's cannot.
    np.testing.assert_allclose(output.logits[:, 0], _run(TOKENS, ONES).logits[:, 0], atol=0.1)
