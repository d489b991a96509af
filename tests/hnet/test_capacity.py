"""The number of chunk slots changes memory alone, unless boundaries are demoted on purpose."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training.mesh import batch_sharding, make_mesh, use_mesh
from hnet import HNetConfig, HNetLM
from tests.support.assertions import SAME_COMPUTATION, assert_golden
from tests.support.models import (
    clear_tokens,
    compiled,
    make_stage,
    one_stage_config,
    random_params,
    two_stage_config,
)

T = 32
CONFIG = one_stage_config()
PARAMS = random_params(CONFIG)
ONES = np.ones((4, T), np.int32)
TOKENS = clear_tokens(CONFIG, PARAMS, ONES)


def _run(config, tokens=TOKENS, segment_ids=ONES):
    return compiled(config)(PARAMS, tokens, segment_ids)


def _gradient(config):
    loss = lambda params: jnp.mean(compiled(config)(params, TOKENS, ONES).logits ** 2)  # noqa: E731
    return jax.jit(jax.grad(loss))(PARAMS)


@pytest.fixture(scope="module")
def full():
    return _run(CONFIG), _gradient(CONFIG)


@pytest.fixture(scope="module")
def counts(full):
    """Boundaries of each row; they differ, or some tests below would show nothing."""
    found = np.asarray(full[0].stages["stage0"].boundary_mask).sum(1)
    assert len(set(found)) > 1 and found.max() < 0.8 * T
    return found


@pytest.mark.parametrize("fields", [
    dict(capacity=0.1, overflow="grow", grow_to=(0.8, 0.9, 1.0)),
    dict(capacity=0.8, overflow="error", packed=True),
    pytest.param(dict(capacity=0.1, overflow="grow", packed=True), marks=pytest.mark.slow),
    pytest.param(dict(capacity=0.8, overflow="error"), marks=pytest.mark.slow),
])
def test_any_way_that_fits_equals_full_capacity_in_value_and_gradient(fields, full):
    config = CONFIG.with_chunking(**fields)
    output = _run(config)
    np.testing.assert_allclose(output.logits, full[0].logits, atol=SAME_COMPUTATION)
    assert (np.asarray(output.stages["stage0"].num_overflow) == 0).all()
    assert_golden(_gradient(config), full[1], limit=1e-5, floor=1e-7)


def test_grow_takes_the_smallest_capacity_that_fits_the_fullest_row(counts):
    exact = counts.max() / T
    for first, expected in ((exact, counts.max()), (exact - 1 / T, T)):
        config = CONFIG.with_chunking(capacity=first, overflow="grow")
        assert int(_run(config).stages["stage0"].num_slots) == expected
    # The same program takes another way for another batch: rows of one repeated byte need few slots.
    grows = CONFIG.with_chunking(capacity=0.1, overflow="grow", grow_to=(0.8, 1.0))
    still = _run(grows, np.full_like(TOKENS, 7)).stages["stage0"]
    assert int(still.num_slots) in (4, 26, T) and int(still.boundary_mask.sum(1).max()) <= int(still.num_slots)
    empty = _run(grows, TOKENS, 0 * ONES).stages["stage0"]
    assert int(empty.num_slots) == 4
    assert compiled(grows)._cache_size() == 1


def test_packed_rows_need_slots_for_their_mean_and_not_for_the_worst(counts):
    capacity = (counts.sum() + 0.5) / (4 * T)
    assert capacity < counts.max() / T
    packed = _run(CONFIG.with_chunking(capacity=capacity, overflow="error", packed=True))
    alone = _run(CONFIG.with_chunking(capacity=capacity, overflow="error"))
    assert np.isfinite(packed.logits).all() and not np.isfinite(alone.logits).all()
    assert int(packed.stages["stage0"].num_slots) == counts.sum() + 1


def test_error_makes_exactly_the_rows_that_overflow_nan(counts, full):
    slots = int(np.median(counts))
    output = _run(CONFIG.with_chunking(capacity=slots / T, overflow="error"))
    over = counts > slots
    assert over.any() and not over.all()
    assert np.isnan(output.logits[over]).all()
    np.testing.assert_allclose(output.logits[~over], full[0].logits[~over], atol=SAME_COMPUTATION)
    np.testing.assert_array_equal(output.stages["stage0"].num_overflow, np.maximum(counts - slots, 0))


def test_metrics_count_boundaries_slots_and_overflow(counts):
    slots = int(np.median(counts))
    metrics = _run(CONFIG.with_chunking(capacity=slots / T)).stages["stage0"].metrics()
    assert metrics["boundaries"] == counts.sum() and metrics["capacity"] == slots
    assert metrics["overflow_rows"] == (counts > slots).sum()
    assert metrics["overflow_boundaries"] == np.maximum(counts - slots, 0).sum()


@pytest.mark.parametrize("packed", [False, True])
def test_all_devices_grow_alike_and_each_packs_its_own_rows(packed, full):
    """One row of one device needs the larger capacity; the others must follow it."""
    config = CONFIG.with_chunking(capacity=0.3, overflow="grow", packed=packed)
    tokens = np.concatenate([np.full((4, T), 9, np.int32), TOKENS])
    mesh = make_mesh(1, jax.devices()[:4])
    with use_mesh(mesh):
        run = jax.jit(lambda params, tokens: HNetLM(config).apply({"params": params}, tokens))
        output = run(PARAMS, jax.device_put(tokens, batch_sharding(mesh)))
    np.testing.assert_allclose(output.logits[4:], full[0].logits, atol=SAME_COMPUTATION)
    assert int(output.stages["stage0"].num_slots) == (2 * T if packed else T)  # two rows a device
    assert len(output.logits.sharding.device_set) == 4 and not output.logits.sharding.is_fully_replicated


def _temporary_bytes(**stage_fields) -> int:
    """Measures the gradient of a model whose inner stage does nearly all the work."""
    inner = make_stage(width=64, encoder="T4", num_heads=2, feed_forward_width=128)
    stages = (CONFIG.stages[0].with_chunking(**stage_fields), inner)
    config = HNetConfig(stages=stages, vocab_size=61)
    params = jax.eval_shape(lambda: random_params(config))

    def loss(params, tokens):
        return jnp.mean(HNetLM(config).apply({"params": params}, tokens).logits ** 2)

    tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    return jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes


def test_memory_follows_the_capacity_and_growing_costs_no_more_than_its_largest_way():
    full, quarter = _temporary_bytes(), _temporary_bytes(capacity=0.25)
    assert quarter < 0.5 * full
    assert _temporary_bytes(capacity=0.25, overflow="grow", grow_to=(1.0,)) < 1.25 * full


def test_rematerialisation_of_a_stage_saves_memory():
    def of_inner(remat):
        inner = make_stage(width=64, encoder="T6", num_heads=2, feed_forward_width=256, remat=remat)
        config = HNetConfig(stages=(inner,), vocab_size=61)
        params = jax.eval_shape(lambda: random_params(config))
        loss = lambda params, tokens: jnp.mean(HNetLM(config).apply({"params": params}, tokens).logits ** 2)  # noqa: E731
        tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
        return jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    none, dots, block = (of_inner(remat) for remat in ("none", "dots", "block"))
    assert block < dots < none


@pytest.mark.slow
def test_a_stage_may_grow_around_one_whose_rows_are_packed():
    """Rows, then buffers: the results of every way through the grown stage have one shape."""
    config = two_stage_config()
    outer, inner, innermost = config.stages
    config = dataclasses.replace(config, stages=(
        outer.with_chunking(capacity=0.3, overflow="grow", grow_to=(0.6, 1.0)),
        inner.with_chunking(overflow="error", packed=True), inner, innermost))
    params = random_params(config)
    grown = compiled(config)(params, TOKENS, ONES)
    whole = compiled(config.at_full_capacity())(params, TOKENS, ONES)
    np.testing.assert_allclose(grown.logits, whole.logits, atol=SAME_COMPUTATION)
    outside, inside = grown.stages["stage1"], grown.stages["stage2"]
    assert inside.is_real.shape[0] == 1 and inside.is_real.sum() == outside.boundary_mask.sum()
