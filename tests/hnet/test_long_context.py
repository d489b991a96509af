"""A Llama as a config: long prompts in pieces of any size, from caches of any dtype, equal one pass."""
import dataclasses

import jax
import numpy as np
import pytest

from hnet import (
    AttentionConfig,
    HNetConfig,
    HNetLM,
    StackConfig,
    StageConfig,
    decode_state_bytes,
    generate,
    init_decode_state,
    prefill,
    step,
)
from hnet.stack_config import CacheConfig
from layers import RotaryScaling
from tests.support.assertions import ANOTHER_SUM_ORDER, assert_golden
from tests.support.models import random_params

LENGTH, LENGTHS = 80, (80, 1, 23)  # tokens of three prompts; pieces of more than 64 are read in blocks


def _llama(**cache) -> HNetConfig:
    attention = AttentionConfig(
        num_heads=6, num_key_heads=2, head_width=8, rotary_width=8, rotary_base=1e5, cache=CacheConfig(**cache),
        rotary_scaling=RotaryScaling(factor=4.0, original_length=16))
    stack = StackConfig(width=24, attention=attention, feed_forward_width=40)
    return HNetConfig(stages=(StageConfig(encoder="T3", stack=stack),), vocab_size=61, tie_embeddings=True)


CONFIG = _llama()
PARAMS = random_params(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 61, (3, LENGTH)).astype(np.int32)
IDS = (np.arange(LENGTH) < np.array(LENGTHS)[:, None]).astype(np.int32)
WHOLE = np.asarray(jax.jit(lambda: HNetLM(CONFIG).apply({"params": PARAMS}, TOKENS, IDS).logits)())
AFTER_PROMPT = WHOLE[np.arange(3), np.array(LENGTHS) - 1]
read = jax.jit(lambda tokens, ids, state: prefill(HNetLM(CONFIG), PARAMS, tokens, ids, state))
read_one = jax.jit(lambda token, state, active: step(HNetLM(CONFIG), PARAMS, token, state, active))


def _pieces(size, side):
    """Cuts the prompt of every row into pieces, padded on one side; short rows end in pieces of padding."""
    for start in range(0, LENGTH, size):
        tokens, ids = np.zeros((3, size), np.int32), np.zeros((3, size), np.int32)
        for row, length in enumerate(LENGTHS):
            count = max(min(size, length - start), 0)
            span = slice(0, count) if side == "right" else slice(size - count, size)
            tokens[row, span], ids[row, span] = TOKENS[row, start : start + count], 1
        yield tokens, ids


def _read_in_pieces(size, side, config=CONFIG):
    state, logits = init_decode_state(config, 3, LENGTH + 4), np.zeros((3, 61), np.float32)
    for tokens, ids in _pieces(size, side):
        fresh, state = read(tokens, ids, state)
        logits = np.where(ids.any(axis=1)[:, None], fresh, logits)
    return logits, state


@pytest.mark.parametrize(("size", "side"), [(1, "left"), (7, "right"), (67, "left"), (LENGTH, "left")])
def test_a_prompt_in_pieces_of_any_size_equals_one_pass(size, side):
    before = read._cache_size()
    logits, state = _read_in_pieces(size, side)
    assert_golden(logits, AFTER_PROMPT, limit=ANOTHER_SUM_ORDER)
    assert read._cache_size() - before <= 1, "one program for pieces of one size"
    assert state.num_tokens.tolist() == list(LENGTHS)


def test_decoding_from_any_pieces_equals_one_pass_and_compiles_once():
    """Row 1 has read one token, row 0 all of its own; rows that have no more tokens sit out."""
    _, state = _read_in_pieces(7, "left", CONFIG)
    position, before = np.array(LENGTHS), read_one._cache_size()
    whole_rows = np.asarray(jax.jit(lambda: HNetLM(CONFIG).apply({"params": PARAMS}, TOKENS).logits)())
    for _ in range(12):
        active = position < LENGTH
        token = TOKENS[np.arange(3), np.minimum(position, LENGTH - 1)]
        logits, state = read_one(token, state, active)
        whole = whole_rows[np.arange(3), np.minimum(position, LENGTH - 1)]
        assert_golden(logits[active], whole[active], limit=ANOTHER_SUM_ORDER)
        position += active
    assert read_one._cache_size() == before + 1


@pytest.mark.parametrize(("dtype", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_a_narrow_cache_rounds_each_key_and_value_once_however_the_prompt_is_cut(dtype, rounding):
    config = _llama(dtype=dtype)
    narrow = [_read_in_pieces(size, "right", config)[0] for size in (LENGTH, 7)]
    assert_golden(narrow[1], narrow[0], limit=rounding / 16)  # a sum in another order may round another way
    error = np.abs(narrow[0] - AFTER_PROMPT)[[0, 2]].max() / np.abs(AFTER_PROMPT).max()  # row 1 is one token long
    assert rounding / 4 < error < 16 * rounding


def test_logits_of_the_last_token_are_those_of_all_and_no_others_are_made():
    def last(tokens, ids):
        return HNetLM(CONFIG).apply({"params": PARAMS}, tokens, ids, logits_of="last").logits

    for side in ("right", "left"):
        (tokens, ids), = _pieces(LENGTH, side)
        logits = jax.jit(last)(tokens, ids)
        assert logits.shape == (3, 1, 61)
        assert_golden(logits[:, 0], AFTER_PROMPT, limit=ANOTHER_SUM_ORDER)
    assert f"3x{LENGTH}x61" not in jax.jit(last).lower(TOKENS, IDS).as_text()


def test_logits_past_the_room_of_a_state_are_nan_and_those_before_are_not():
    state = init_decode_state(CONFIG, 3, 8)
    logits, state = read(TOKENS[:, :7], IDS[:, :7], state)
    assert np.isfinite(logits).all()
    for num_nan in (0, 2):  # rows 0 and 2 fill 8 slots and then pass them; row 1 has read one token
        logits, state = read_one(TOKENS[:, 7], state, np.ones(3, bool))
        assert np.isnan(logits).all(axis=1).sum() == num_nan


def test_the_bytes_of_a_state_are_counted_without_making_it():
    for config in (CONFIG, _llama(dtype="bfloat16"), _llama(policy="window", budget=5)):
        state = init_decode_state(config, 2, 30)
        assert decode_state_bytes(config, 2, 30) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    num_cached = 2 * 3 * 2 * 30 * 8  # rows, layers, heads, slots, width: of the keys alone
    saved = decode_state_bytes(CONFIG, 2, 30) - decode_state_bytes(_llama(dtype="bfloat16"), 2, 30)
    assert saved == 2 * 2 * num_cached


def test_generate_refuses_to_go_past_the_context_of_the_model():
    config = dataclasses.replace(CONFIG, context_length=20)
    with pytest.raises(ValueError, match=r"15 tokens and 6 more are 21, .* context_length 20; .* at most 5"):
        next(generate(HNetLM(config), PARAMS, [[1], [1] * 15], num_tokens=6))
