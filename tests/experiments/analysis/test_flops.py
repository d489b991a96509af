import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import layers
from experiments.analysis.flops import count_flops, model_flops_per_byte
from hnet import HNetConfig
from tests.support.models import make_stage


def _array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_matmul_takes_two_per_multiply_add():
    assert count_flops(lambda a, b: a @ b, _array(3, 5), _array(5, 7)) == 2 * 3 * 5 * 7
    assert count_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), _array(4, 3, 5), _array(4, 5, 7)) == 840
    assert count_flops(lambda a: a + 1, _array(3, 5)) == 0


def test_a_scan_counts_its_body_as_often_as_it_runs_and_a_cond_its_costliest_branch():
    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=6)[0]

    def either(flag, x, w):
        return jax.lax.cond(flag, lambda: x @ w @ w, lambda: x @ w)

    assert count_flops(scanned, _array(3, 5), _array(5, 5)) == 6 * 2 * 3 * 5 * 5
    assert count_flops(either, jax.ShapeDtypeStruct((), bool), _array(3, 5), _array(5, 5)) == 2 * 2 * 3 * 5 * 5


def test_what_is_computed_again_counts_again():
    def loss(w, x):
        return jnp.sum(jax.checkpoint(lambda w: jnp.sin(x @ w))(w))

    stored = count_flops(jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w))), _array(5, 7), _array(3, 5))
    assert stored == 2 * 2 * 3 * 5 * 7  # forward, and the gradient of w
    assert count_flops(jax.grad(loss), _array(5, 7), _array(3, 5)) == 3 * 2 * 3 * 5 * 7


def test_a_convolution_counts_its_taps():
    def run(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))

    assert count_flops(run, _array(2, 10, 3), _array(4, 3, 5)) == 2 * (2 * 7 * 5) * (4 * 3)


def test_a_loop_of_unknown_length_is_refused():
    def run(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ w, x)

    with pytest.raises(ValueError, match="loop whose length is not known"):
        count_flops(run, _array(3, 5), _array(5, 5))


def test_block_sparse_attention_counts_all_tiles_that_its_lists_have_room_for():
    """One cost on every platform and in every implementation, in loops and batches, with both passes backward."""
    def attend(q, k, v, implementation="auto"):
        return layers.sliding_window_attention(q, k, v, window=20, block=16, implementation=implementation)

    q, kv = _array(2, 64, 4, 8), _array(2, 64, 2, 8)
    tiles = 4 * 3 * 2 * 4  # 4 blocks of queries read up to 3 of keys, for 2 rows and 4 heads
    per_product = 2 * 16 * 16 * 8
    forward = count_flops(attend, q, kv, kv)
    assert forward == count_flops(partial(attend, implementation="xla"), q, kv, kv) == tiles * 2 * per_product
    gradient = count_flops(jax.grad(lambda *x: jnp.sum(attend(*x) ** 2), (0, 1, 2)), q, kv, kv)
    assert gradient == tiles * (2 + 7) * per_product
    several = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (q, kv, kv)]
    assert count_flops(jax.vmap(attend), *several) == 3 * forward


def test_the_log_sum_exp_of_attention_costs_no_second_pass_over_the_scores():
    x = _array(1, 32, 2, 8)
    once = 2 * 2 * 2 * 32 * 32 * 8
    assert count_flops(lambda x: layers.attend(x, x, x).o, x) == once
    assert count_flops(lambda x: tuple(layers.attend(x, x, x)), x) == once
    compiled = jax.jit(lambda x: tuple(layers.attend(x, x, x))).lower(x).compile()
    assert compiled.as_text().count(" dot(") == 2


def test_a_layer_of_sparse_attention_has_a_cost():
    layer = layers.SparseAttention(
        num_heads=4, num_key_heads=2, attend=partial(layers.moba_attention, top_k=2, block=16))
    x = _array(1, 64, 16)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert count_flops(layer.apply, params, x) > 2 * 64 * 16 * 16


WIDTH, FEED_FORWARD, LAYERS, T, VOCAB = 16, 24, 3, 32, 61
TRANSFORMER = make_stage(
    width=WIDTH, encoder=f"T{LAYERS}", num_heads=2, feed_forward_width=FEED_FORWARD)


def _transformer_flops(tokens: float) -> float:
    """Counts a row's FLOPs in the blocks: projections, scores and sums over values, feed-forward."""
    return LAYERS * 2 * tokens * (4 * WIDTH**2 + 2 * tokens * WIDTH + 3 * WIDTH * FEED_FORWARD)


def test_a_transformer_has_the_flops_of_the_formula():
    config = HNetConfig(stages=(TRANSFORMER,), vocab_size=VOCAB)
    expected = _transformer_flops(T) / T + 2 * WIDTH * VOCAB
    assert model_flops_per_byte(config, T, ()) == expected


def test_inner_stages_count_by_their_chunks_whatever_capacity_the_config_has():
    outer = dataclasses.replace(TRANSFORMER, encoder="t1", decoder="t1")
    outer = outer.with_chunking(router="stride", capacity=0.5)
    config = HNetConfig(stages=(outer, TRANSFORMER), vocab_size=VOCAB)
    whole, quarter = (model_flops_per_byte(config, T, (n,)) for n in (1.0, 4.0))
    assert whole - quarter == (_transformer_flops(T) - _transformer_flops(T / 4)) / T
    grows = config.with_chunking(overflow="grow", packed=True)
    assert model_flops_per_byte(grows, T, (4.0,)) == quarter


def test_numbers_that_do_not_fit_are_refused():
    config = HNetConfig(stages=(TRANSFORMER,), vocab_size=VOCAB)
    with pytest.raises(ValueError, match="must be 0 numbers"):
        model_flops_per_byte(config, T, (4.0,))
