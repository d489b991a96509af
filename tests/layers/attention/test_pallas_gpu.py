"""The Hopper kernels against the definition, on the GPU interpreter; tests/test_kernels.py compiles them."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from layers.attention.attend import attend
from layers.attention.block_lists import BlockLists, pack_query_bits
from layers.attention.block_sparse import pallas_gpu
from layers.attention.block_sparse.tiles import AttentionSettings, Sizes, make_tiles
from layers.attention.mask import CAUSAL, SAME_SEGMENT, Bits, Mask, Window, token_info
from tests.support.assertions import assert_matches

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip(f"jax {jax.__version__} has no GPU interpreter; 0.11 has", allow_module_level=True)

T = 256


@pytest.fixture(autouse=True)
def _few_slots(monkeypatch):
    """Lists here are short, and are to use the slots of a ring more than once."""
    monkeypatch.setattr(pallas_gpu, "MAX_SLOTS", 2)


def _settings(mask: Mask, *, width: int, block_k: int, interpret, softcap=None) -> AttentionSettings:
    return AttentionSettings(block_q=128, block_k=block_k, mask=mask, softcap=softcap, scale=width ** -0.5,
                             implementation="pallas_gpu", interpret=interpret)


def _run(mask: Mask, softcap, tokens, blocks: BlockLists, interpret, inputs, cotangents):
    """Output, lse and gradients, time first as callers see them."""
    (q, k, v), (do, dlse) = inputs, cotangents
    settings = _settings(mask, width=q.shape[-1], block_k=blocks.block_k, interpret=interpret, softcap=softcap)
    tiles = make_tiles(blocks, mask, *tokens, batch=q.shape[0])
    o, lse = pallas_gpu.forward(settings, q, k, v, tiles)
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1).swapaxes(1, 2) - dlse
    return o, lse, pallas_gpu.backward(settings, q, k, v, tiles, lse, delta, do)


def _check(mask, listed, *, heads=1, key_heads=1, width=64, value_width=None, block_k=64, detect_races=False,
           softcap=None, rows=None, positions=None, segments=None, bits=None):
    """Compares with the definition for the blocks in `listed` [b, m, i, j]; returns the results of the kernels."""
    batch, num_queries, num_keys = listed.shape[0], 128 * listed.shape[2], block_k * listed.shape[3]
    blocks = BlockLists.from_block_mask(listed, block_q=128, block_k=block_k)
    blocks = dataclasses.replace(blocks, rows=rows)
    tokens = (token_info(num_queries, positions=positions, segment_ids=segments, bits=bits),
              token_info(num_keys, segment_ids=segments, bits=bits))
    keys = jax.random.split(jax.random.key(heads + width), 5)
    value_width = value_width or width
    shapes = [(num_queries, heads, width), (num_keys, key_heads, width), (num_keys, key_heads, value_width),
              (num_queries, heads, value_width)]
    *inputs, do = (jax.random.normal(key, (batch, *shape)).astype(jnp.bfloat16)
                   for key, shape in zip(keys, shapes, strict=False))
    dlse = jax.random.normal(keys[4], (batch, heads, num_queries))
    exact = [x.astype(jnp.float32) for x in inputs]
    (expected, expected_lse), vjp = jax.vjp(lambda *x: tuple(attend(
        *x, mask=mask, q_tokens=tokens[0], kv_tokens=tokens[1], blocks=blocks, softcap=softcap,
        implementation="reference")), *exact)
    seen = expected_lse > -jnp.inf
    expected_gradients = vjp((do.astype(jnp.float32), jnp.where(seen, dlse, 0)))

    interpret = plgpu.InterpretGPUParams(detect_races=detect_races)
    o, lse, gradients = _run(mask, softcap, tokens, blocks, interpret, inputs, (do, dlse))

    np.testing.assert_array_equal(lse > -jnp.inf, seen)
    assert_matches(jnp.where(seen, lse, 0), jnp.where(seen, expected_lse, 0), dtype="float32", scale=2)
    assert o.dtype == jnp.bfloat16 and all(x.dtype == jnp.bfloat16 for x in gradients)
    is_read = jnp.repeat(jnp.any(listed, axis=(0, 1, 2)), block_k)
    assert all((x[:, ~is_read] == 0).all() for x in gradients[1:])

    def of_read(gradients):  # zeros of the other keys would make the errors of these look large
        return gradients[0], *(x[:, is_read] for x in gradients[1:])

    assert_matches((o, of_read(gradients)), (expected, of_read(expected_gradients)), dtype="bfloat16", scale=2)
    return o, lse, gradients


def _listed(*, lists=1, block_k=64, batch=1):
    return jax.random.bernoulli(jax.random.key(3), 0.7, (batch, lists, T // 128, T // block_k))


MASK = CAUSAL & SAME_SEGMENT
SEGMENTS = jnp.where(jnp.arange(T) < 10, 0, 1 + jnp.arange(T) // 90)[None]
BITS = jnp.where(jnp.arange(T) % 37 < 3, 5, 0)[None]
CHOSEN = pack_query_bits(jax.random.bernoulli(jax.random.key(9), 0.5, (1, 1, T, T // 64)))


@pytest.mark.parametrize("width", [64, 128])
def test_matches_the_definition_without_races(width):
    everything = jnp.ones((1, 1, T // 128, T // 64), bool)
    _check(MASK, everything, heads=2, width=width, detect_races=True)


@pytest.mark.parametrize(("mask", "options"), [
    pytest.param(MASK & Window(100), dict(block_k=128, softcap=2.0), id="window and softcap"),
    pytest.param(SAME_SEGMENT, dict(), id="without a mask"),
    pytest.param(MASK, dict(segments=SEGMENTS), id="segments"),
    pytest.param(CAUSAL & (Window(40) | Bits()), dict(segments=SEGMENTS, bits=BITS), id="bits"),
    pytest.param(MASK, dict(heads=2, rows=CHOSEN), id="keys chosen per query"),
    pytest.param(MASK, dict(heads=4, key_heads=2, lists=2), id="lists per key head"),
    pytest.param(MASK, dict(heads=4, key_heads=2, lists=4, block_k=128), id="lists per query head"),
    pytest.param(MASK, dict(width=96, value_width=64), id="widths that are padded"),
    pytest.param(MASK, dict(width=192, heads=2), id="wide heads"),
    pytest.param(MASK, dict(batch=2, positions=jnp.arange(T) + jnp.array([[0], [5]])), id="positions per row"),
])
def test_matches_the_definition(mask, options):
    options = dict(options)
    listed = _listed(lists=options.pop("lists", 1), batch=options.pop("batch", 1),
                     block_k=options.get("block_k", 64))
    _check(mask, listed, **options)


def test_choice_per_query_among_more_blocks_than_a_word_has_bits():
    chosen = jax.random.bernoulli(jax.random.key(9), 0.5, (1, 1, 128, 34))
    listed = jnp.isin(jnp.arange(34), jnp.array([1, 32, 33]))[None, None, None]
    _check(SAME_SEGMENT, listed, rows=pack_query_bits(chosen))


def test_what_is_in_no_list_gets_nothing():
    listed = jnp.array([[[[True, False, False, True], [False, False, False, False]]]])  # the second query block
    o, lse, (dq, _, _) = _check(SAME_SEGMENT, listed)
    assert (o[:, 128:] == 0).all() and (lse[:, :, 128:] == -jnp.inf).all() and (dq[:, 128:] == 0).all()


def test_says_why_it_cannot_run():
    settings = _settings(MASK, width=64, block_k=64, interpret=True)

    def reason(dtype=jnp.bfloat16, width=64, value_width=64, **changes):
        return pallas_gpu.unsupported(
            dataclasses.replace(settings, **changes), Sizes(2, 4, 1, 4, jnp.dtype(dtype), width, value_width))

    assert reason() is None
    assert reason(width=96, value_width=128, block_k=128) is None
    assert reason(width=256) is None
    assert "float32" in reason(dtype=jnp.float32)
    assert "257 wide" in reason(value_width=257)
    assert "block_q" in reason(block_q=64)
    assert "block_k" in reason(block_k=32)
    assert "block_k 64" in reason(width=129, block_k=128)
    assert "scale" in reason(scale=-1.0)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA A100", None, "gpu"))):
        assert "this is NVIDIA A100" in reason(interpret=False)
