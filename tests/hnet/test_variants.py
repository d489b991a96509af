"""Models with other routers, downsamplers and upsamplers: causal, in segments, and the same token by token."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet import HNetConfig, HNetLM, init_decode_state
from tests.support.assertions import GOLDEN_LOGITS_ERROR, SAME_COMPUTATION
from tests.support.models import (
    compiled_with_state,
    one_stage_config,
    random_params,
    stepped_logits,
    two_stage_config,
)

T = 24
DRAW = np.random.default_rng(1)
TOKENS = DRAW.integers(0, 61, (3, T), dtype=np.int32)
LEVELS = DRAW.integers(0, 3, (3, T), dtype=np.int32)


def _mixed(first: dict, second: dict) -> HNetConfig:
    """Two chunking stages, attention alone."""
    outer, inner = one_stage_config().stages
    attention = dataclasses.replace(outer.stack.attention, window=3)
    middle = outer.with_stack(attention=attention).with_chunking(**second)
    return HNetConfig(stages=(outer.with_chunking(**first), middle, inner), vocab_size=61)


CONFIGS = {
    "merged": two_stage_config(capacity=0.4),
    "megabyte-like": _mixed(*[dict(router="stride", router_stride=3, downsampler="mean", upsampler="none")] * 2),
    "aunet-like": _mixed(dict(router="space", upsampler="none"), dict(router="stride", router_stride=2)),
    "pooled and smoothed over tokens": _mixed(
        dict(downsampler="max", upsampler="smooth_tokens"), dict(downsampler="mean", capacity=0.5)),
    "pooled by attention, with lengths": _mixed(
        dict(downsampler="attention", length_embedding=4), dict(downsampler="last", upsampler="none")),
    "first vectors with lengths": _mixed(
        dict(length_embedding=3), dict(downsampler="mean_sqrt_length", length_embedding=5, capacity=0.6)),
    "given": _mixed(*[dict(router="given", upsampler="none")] * 2),
    "blt-like": one_stage_config(
        HNetConfig(stages=one_stage_config().stages[1:], vocab_size=61),
        router="entropy", entropy_threshold=3.2, downsampler="max"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def variant(request):
    """(config, parameters, levels or None, what the whole rows give)."""
    config = CONFIGS[request.param]
    params = random_params(config)
    levels = LEVELS if request.param == "given" else None
    run = compiled_with_state(config)
    return config, params, levels, lambda tokens, ids: run(params, tokens, ids, None, levels)


def test_it_chunks_at_every_stage(variant):
    output = variant[3](TOKENS, np.ones_like(TOKENS))
    for name, stage in output.stages.items():
        count, tokens = int(stage.boundary_mask.sum()), int(stage.is_real.sum())
        assert 3 <= count < tokens, name


def test_prompts_and_steps_equal_the_whole(variant):
    config, params, levels, whole = variant
    actual = stepped_logits(config, params, TOKENS, prompt_lengths=(1, 9, 5), boundary_levels=levels)
    np.testing.assert_allclose(actual, whole(TOKENS, np.ones_like(TOKENS)).logits, atol=GOLDEN_LOGITS_ERROR)


def test_a_later_byte_changes_nothing_before_it(variant):
    before = variant[3](TOKENS, np.ones_like(TOKENS)).logits
    for position in (1, 11, T - 1):
        changed = TOKENS.copy()
        changed[:, position] = (changed[:, position] + 7) % 61
        after = variant[3](changed, np.ones_like(TOKENS)).logits
        np.testing.assert_allclose(after[:, :position], before[:, :position], atol=SAME_COMPUTATION)


def test_packed_segments_equal_separate_rows(variant):
    config, _, levels, whole = variant
    if config.stages[0].chunking.capacity < 1 or levels is not None:
        pytest.skip("a row's slots are shared by its segments; given boundaries belong to a row")
    ids, tokens = np.zeros((3, T), np.int32), np.zeros((3, T), np.int32)
    apart_ids = np.zeros((3, T), np.int32)
    spans = ((1, 6), (7, 11), (19, 4))
    for row, (start, length) in enumerate(spans):
        ids[0, start : start + length] = row + 1
        tokens[0, start : start + length] = TOKENS[row, :length]
        apart_ids[row, :length] = 1
    packed, apart = whole(tokens, ids).logits[0], whole(TOKENS, apart_ids).logits
    for row, (start, length) in enumerate(spans):
        np.testing.assert_allclose(packed[start : start + length], apart[row, :length], atol=SAME_COMPUTATION)


def test_rows_of_several_segments_in_pieces_equal_the_whole(variant):
    """Segments begin at the start of a piece and amid one, with padding between and without."""
    config, params, levels, whole = variant
    if any(stage.chunking.capacity < 1 for stage in config.stages):
        pytest.skip("a row's slots are shared by its segments, those of a state belong to each")
    ids = np.array([[0] * 2 + [3] * 6 + [5] * 6 + [6] * 10, [1] * 24, [4] * 11 + [0] + [2] * 12], np.int32)
    expected = np.asarray(whole(TOKENS, ids).logits)
    run, state = compiled_with_state(config), init_decode_state(config, 3, T)
    for start in range(0, T, 8):  # of one length, for one program
        piece = slice(start, start + 8)
        output = run(params, TOKENS[:, piece], ids[:, piece], state, None if levels is None else levels[:, piece])
        state, is_real = output.state, ids[:, piece] != 0
        np.testing.assert_allclose(
            np.asarray(output.logits)[is_real], expected[:, piece][is_real], atol=GOLDEN_LOGITS_ERROR)


def test_options_that_a_model_lacks_have_no_parameters():
    plain, optional = CONFIGS["aunet-like"], CONFIGS["pooled by attention, with lengths"]
    names = [set(random_params(config)["stage0"]) for config in (plain, optional)]
    assert names[1] - names[0] >= {"pooling", "length_embedding"}
    assert not names[0] & {"pooling", "length_embedding"}


def test_the_boundary_model_gets_no_gradient():
    config = CONFIGS["blt-like"]
    loss = lambda params: jnp.mean(HNetLM(config).apply({"params": params}, TOKENS).logits ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(random_params(config))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["boundary_lm"]))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(gradient["stage0"]))


def test_given_boundaries_are_asked_for():
    config = CONFIGS["given"]
    with pytest.raises(ValueError, match="needs boundary_levels"):
        HNetLM(config).apply({"params": random_params(config)}, TOKENS)


def test_logits_past_the_length_of_a_state_are_nan_and_those_before_are_right():
    config = one_stage_config()
    params = random_params(config)
    actual = stepped_logits(config, params, TOKENS, prompt_lengths=(1, 9, 5), max_length=20)
    assert np.isfinite(actual[:, :20]).all() and np.isnan(actual[:, 20:]).all()


def test_a_state_needs_room():
    with pytest.raises(ValueError, match="at least 1 row of 1 token, not 0 of 5"):
        init_decode_state(one_stage_config(), 0, 5)
