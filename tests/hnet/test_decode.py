"""Decoding with a state: any batch, ragged prompts, token by token, equal to reading everything at once."""
import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet import HNetConfig, HNetLM, from_official_json, init_decode_state, load_official_params
from tests.support.assertions import GOLDEN_LOGITS_ERROR, golden
from tests.support.models import clear_tokens, make_stage, random_params, two_stage_config


@cache
def _step(config):
    model = HNetLM(config)
    return jax.jit(lambda params, tokens, segment_ids, state: model.apply(
        {"params": params}, tokens, segment_ids, state))


@pytest.mark.parametrize("name", ["hnet_a_1stage", "hnet_b_2stage"])
def test_prefill_and_steps_match_the_release_for_every_row_of_a_batch(name):
    data = golden(name)
    config = from_official_json(str(data["config_json"]))
    params = load_official_params(
        {key.removeprefix("param/"): value for key, value in data.items() if key.startswith("param/")}, config)
    tokens, length = data["input_ids"], int(data["prefill_len"])
    rows = tokens.shape[0]
    num_steps = len(data["step_logits"])
    step = _step(config)

    output = step(params, tokens[:, :length], np.ones((rows, length), np.int32),
                  init_decode_state(config, rows, length + num_steps))
    assert np.abs(output.logits[0] - data["prefill_logits"]).max() <= GOLDEN_LOGITS_ERROR
    for index in range(num_steps):
        token = tokens[:, length + index, None]
        output = step(params, token, np.ones((rows, 1), np.int32), output.state)
        assert np.abs(output.logits[0, 0] - data["step_logits"][index]).max() <= GOLDEN_LOGITS_ERROR
        whole = data["logits_packed"][:, length + index]
        assert np.abs(output.logits[:, 0] - whole).max() <= GOLDEN_LOGITS_ERROR
        boundaries = [bool(stage.boundary_mask[0, 0]) for stage in output.stages.values()]
        assert boundaries == data["step_boundary_mask"][index].tolist()
    assert step._cache_size() == 2, "one program for the prefill and one for every step"


CONFIG = two_stage_config()
PARAMS = random_params(CONFIG)
LENGTH = 24
TOKENS = clear_tokens(CONFIG, PARAMS, np.ones((3, LENGTH), np.int32))


def _whole():
    return np.asarray(_step(CONFIG)(PARAMS, TOKENS, np.ones_like(TOKENS), None).logits)


@pytest.mark.parametrize("side", ["right", "left"])
def test_ragged_prompts_then_steps_equal_the_whole(side):
    """Prompt lengths include 1, shorter than the convolution, and the longest."""
    lengths, size = np.array([1, 9, 5]), 9
    prompt, ids = np.zeros((3, size), np.int32), np.zeros((3, size), np.int32)
    spans = [slice(0, n) if side == "right" else slice(size - n, size) for n in lengths]
    for row, span in enumerate(spans):
        prompt[row, span], ids[row, span] = TOKENS[row, : lengths[row]], 1
    whole = _whole()
    output = _step(CONFIG)(PARAMS, prompt, ids, init_decode_state(CONFIG, 3, LENGTH))
    for row, span in enumerate(spans):
        np.testing.assert_allclose(output.logits[row, span], whole[row, : lengths[row]], atol=GOLDEN_LOGITS_ERROR)
    while (lengths < LENGTH).any():
        active = lengths < LENGTH
        token = TOKENS[np.arange(3), np.minimum(lengths, LENGTH - 1)][:, None]
        output = _step(CONFIG)(PARAMS, token, active[:, None].astype(np.int32), output.state)
        for row in np.flatnonzero(active):
            np.testing.assert_allclose(
                output.logits[row, 0], whole[row, lengths[row]], atol=GOLDEN_LOGITS_ERROR)
        lengths += active


def test_a_prompt_read_in_pieces_equals_one_read_at_once():
    output = None
    state = init_decode_state(CONFIG, 3, LENGTH)
    pieces = []
    for start, stop in ((0, 7), (7, 9), (9, LENGTH)):
        output = _step(CONFIG)(PARAMS, TOKENS[:, start:stop], np.ones((3, stop - start), np.int32), state)
        state = output.state
        pieces.append(output.logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), _whole(), atol=GOLDEN_LOGITS_ERROR)


def test_a_row_that_sits_out_keeps_every_byte_of_its_state():
    state = init_decode_state(CONFIG, 3, LENGTH)
    before = _step(CONFIG)(PARAMS, TOKENS[:, :8], np.ones((3, 8), np.int32), state).state
    after = _step(CONFIG)(PARAMS, TOKENS[:, 8:9], np.array([[1], [0], [1]], np.int32), before).state

    def check(old, new):
        # Stacked over layers, a mixer's state has its batch axis second; everything else has it first.
        axis = 0 if old.shape[0] == 3 else 1
        np.testing.assert_array_equal(np.asarray(old).take(1, axis), np.asarray(new).take(1, axis))

    jax.tree.map(check, before, after)
    changed = jax.tree.map(lambda old, new: bool(jnp.any(old != new)), before, after)
    assert any(jax.tree.leaves(changed))


def test_attention_outside_a_window_and_tied_embeddings_decode_too():
    stages = (dataclasses.replace(CONFIG.stages[1], encoder="T1m1", decoder="M1"), CONFIG.stages[2])
    config = HNetConfig(stages=stages, vocab_size=61, tie_embeddings=True)
    params = random_params(config, seed=1)
    ones = np.ones((3, 14), np.int32)
    tokens = clear_tokens(config, params, ones)
    whole = _step(config)(params, tokens, ones, None).logits
    output = _step(config)(params, tokens[:, :2], ones[:, :2], init_decode_state(config, 3, 14))
    for index in range(2, 14):
        output = _step(config)(params, tokens[:, index, None], ones[:, :1], output.state)
        np.testing.assert_allclose(output.logits[:, 0], whole[:, index], atol=GOLDEN_LOGITS_ERROR)


def test_what_a_row_may_merge_to_is_that_of_a_row_in_training():
    """0.5 of the 8 slots in which stage0 has an error past the last, not of the 16 tokens it makes room for."""
    common = dict(width=16, num_heads=2, capacity=0.5)
    config = HNetConfig(stages=(
        make_stage(encoder="t1", decoder="t1", overflow="error", **common),
        make_stage(encoder="t1", decoder="t1", overflow="merge", **common),
        make_stage(encoder="t1", **common)))
    stage = init_decode_state(config, 1, 16).stage
    assert (stage.max_chunks, stage.inner.max_chunks) == (16, 4)
