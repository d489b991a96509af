"""Input at the edges: everything or nothing is a boundary, one token, no token, and documents of 100 kB."""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet import HNetConfig, HNetLM, init_decode_state, prefill
from tests.support.assertions import GOLDEN_LOGITS_ERROR
from tests.support.models import make_stage, one_stage_config, random_params

T = 16


def _value_and_gradient(config, params, tokens, segment_ids, levels):
    def loss(params):
        output = HNetLM(config).apply({"params": params}, tokens, segment_ids, boundary_levels=levels)
        real = jnp.where((segment_ids != 0)[..., None], output.logits, 0)
        return jnp.sum(real**2) + sum(stage.ratio_loss(4.0) for stage in output.stages.values()), output

    (value, output), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return value, gradient, output


@pytest.mark.parametrize("downsampler", ["first", "max"])
def test_all_none_and_one_are_finite_in_value_and_gradient(downsampler):
    """Rows: every token a boundary, none but the first, a single token, no token at all."""
    config = one_stage_config(router="given", downsampler=downsampler)
    params = random_params(config)
    tokens = np.full((4, T), 97, np.int32) % config.vocab_size
    segment_ids, levels = np.ones((4, T), np.int32), np.zeros((4, T), np.int32)
    levels[0] = 1
    segment_ids[2, 1:] = segment_ids[3] = 0
    run = jax.jit(partial(_value_and_gradient, config))
    value, gradient, output = run(params, tokens, segment_ids, levels)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert output.stages["stage0"].boundary_mask.sum(1).tolist() == [T, 1, 1, 0]


def test_repeated_bytes_and_a_row_of_length_one_go_through_a_learned_router():
    config = one_stage_config()
    params = random_params(config)
    run = jax.jit(partial(_value_and_gradient, config), static_argnums=3)
    for tokens in (np.full((2, T), 5, np.int32), np.zeros((1, 1), np.int32)):
        value, gradient, _ = run(params, tokens, np.ones_like(tokens), None)
        assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize("overflow", ["grow", "merge"])
def test_a_document_of_100_kb_is_read_in_pieces_of_any_size(overflow):
    common = dict(num_heads=2, rotary_width=8, feed_forward_width=24, state_size=8, head_width=16)
    config = HNetConfig(vocab_size=256, stages=(
        make_stage(width=16, encoder="m1", decoder="t1", window=63, capacity=0.7, overflow=overflow, **common),
        make_stage(width=16, encoder="T1", **common)))
    params = random_params(config)
    document = np.random.default_rng(0).integers(0, 256, (1, 100_000), dtype=np.int32)

    def read(size):
        run = jax.jit(partial(prefill, HNetLM(config)), donate_argnums=3)
        state = init_decode_state(config, 1, document.shape[1])
        logits = []
        for start in range(0, document.shape[1], size):
            piece = np.zeros((1, size), np.int32)
            part = document[:, start : start + size]
            piece[:, : part.shape[1]] = part
            last, state = run(params, piece, (np.arange(size)[None] < part.shape[1]).astype(np.int32), state)
            logits.append(last)
        assert run._cache_size() == 1
        return np.concatenate(logits), state

    halves, state = read(500)
    wholes, other = read(1000)
    np.testing.assert_allclose(halves[1::2], wholes, atol=GOLDEN_LOGITS_ERROR)
    assert np.isfinite(halves).all() and int(state.num_tokens[0]) == 100_000
    assert int(state.stage.num_chunks[0]) == int(other.stage.num_chunks[0]) > 10_000
    window = state.stage.decoder.runs[0].k  # [layers, b, n, s, k]
    assert window.shape[3] == 64, "attention with a window keeps no more than its window"


def test_a_stage_without_chunks_yet_reads_none():
    """A row that starts with padding only, then goes on: its state is as if it had begun later."""
    config = one_stage_config(upsampler="smooth_tokens")
    params = random_params(config)
    run = jax.jit(partial(prefill, HNetLM(dataclasses.replace(config))))
    tokens = np.arange(6, dtype=np.int32)[None]
    ones = np.ones_like(tokens)
    _, waited = run(params, tokens, 0 * ones, init_decode_state(config, 1, 12))
    late, _ = run(params, tokens, ones, waited)
    early, _ = run(params, tokens, ones, init_decode_state(config, 1, 12))
    np.testing.assert_allclose(late, early, atol=GOLDEN_LOGITS_ERROR)
