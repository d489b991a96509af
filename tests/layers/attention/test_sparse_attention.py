"""Each way to choose what attention reads, against attention under the mask that its definition says."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import (
    NativeSparseAttention,
    SparseAttention,
    big_bird_attention,
    dilated_attention,
    document_attention,
    moba_attention,
    native_sparse_attention,
    paged_attention,
    sliding_window_attention,
)
from layers.attention.dense import attend_reference
from tests.support.assertions import assert_matches
from tests.support.inputs import Draw

B, T, H, N, K, BLOCK = 2, 45, 4, 2, 8, 8
QUERY, KEY = np.arange(T)[:, None], np.arange(T)[None]
SEGMENTS = np.repeat([[1, 2, 0], [1, 1, 2]], 15, axis=1).astype(np.int32)
SAME = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (SEGMENTS[:, :, None] != 0)


def _inputs(seed=0):
    draw = Draw(seed)
    return draw(B, T, H, K), draw(B, T, N, K), draw(B, T, N, K)


def _dense(q, k, v, mask):
    """Attention under [b or 1, h or 1, t, s]."""
    allowed = jnp.asarray(np.broadcast_to(mask, (B, H, T, T)))
    return attend_reference(q, k, v, allowed, scale=q.shape[-1] ** -0.5).o


@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize(("attend", "mask"), [
    (partial(sliding_window_attention, window=10), (KEY <= QUERY) & (QUERY - KEY <= 10)),
    (document_attention, KEY <= QUERY),
    (partial(dilated_attention, window=13, dilation=3),
     (KEY <= QUERY) & (QUERY - KEY <= 13) & ((QUERY - KEY) % 3 == 0)),
    (partial(big_bird_attention, num_near=2, num_global=1, num_random=0),
     (KEY <= QUERY) & ((QUERY // BLOCK - KEY // BLOCK < 2) | (KEY < BLOCK))),
], ids=["window", "document", "dilated", "big_bird"])
def test_fixed_patterns_read_what_they_say(attend, mask, segments):
    inputs = _inputs()
    allowed = mask[None, None] if segments is None else mask & SAME[:, None]
    segments = None if segments is None else jnp.asarray(segments)
    y = jax.jit(partial(attend, block=BLOCK))(*inputs, segments)
    assert_matches(y, _dense(*inputs, allowed), dtype="float32", scale=2)


def test_big_bird_adds_random_earlier_blocks_the_same_ones_each_time():
    inputs = _inputs()
    attend = jax.jit(partial(big_bird_attention, num_near=1, num_global=1, block=4),
                     static_argnames=("num_random", "seed"))
    none, some, again, other = (attend(*inputs, num_random=n, seed=s) for n, s in ((0, 0), (2, 0), (2, 0), (2, 1)))
    changed = np.abs(np.asarray(some - none)).max(axis=(0, 2, 3)) > 1e-6
    assert changed[8:].any() and not changed[:8].any(), "the first two blocks have no others to draw from"
    np.testing.assert_array_equal(some, again)
    assert not np.array_equal(some, other)


def _moba_mask(q, k, top_k, is_real):
    """Token by token and head by head, in plain loops."""
    mask = np.zeros((B, H, T, T), bool)
    for b, h, i in np.ndindex(B, H, T):
        own = i // BLOCK
        means = []
        for block in range(own):
            tokens = [t for t in range(block * BLOCK, (block + 1) * BLOCK) if is_real[b, t]]
            means.append(np.mean([k[b, t, h // 2] for t in tokens], axis=0) if tokens else np.zeros(K))
        scores = [float(q[b, i, h] @ mean) for mean in means]
        chosen = {own, *sorted(range(own), key=lambda block: (-scores[block], block))[: top_k - 1]}
        mask[b, h, i] = [j <= i and j // BLOCK in chosen for j in range(T)]
    return mask


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_moba_reads_its_own_block_and_those_of_the_best_mean_keys(segments):
    q, k, v = _inputs()
    is_real = np.ones((B, T), bool) if segments is None else segments != 0
    mask = _moba_mask(np.asarray(q), np.asarray(k), 3, is_real)
    mask = mask if segments is None else mask & SAME[:, None]
    segments = None if segments is None else jnp.asarray(segments)
    y = jax.jit(partial(moba_attention, top_k=3, block=BLOCK))(q, k, v, segments)
    assert_matches(y, _dense(q, k, v, mask), dtype="float32", scale=2)


def test_moba_with_room_for_all_blocks_is_causal_attention_and_its_gradient():
    inputs = _inputs()
    loss = lambda attend: jax.jit(jax.grad(lambda *x: jnp.sum(attend(*x) ** 2), (0, 1, 2)))(*inputs)  # noqa: E731
    assert_matches(loss(partial(moba_attention, top_k=9, block=BLOCK)),
                   loss(lambda q, k, v: _dense(q, k, v, (KEY <= QUERY)[None, None])), dtype="float32", scale=4)


def test_native_sparse_attention_is_the_sum_of_its_gated_branches():
    q, k, v = _inputs()
    draw = Draw(3)
    count = T // BLOCK
    summary_k, summary_v, gates = draw(B, count, N, K), draw(B, count, N, K), draw.uniform(B, T, H, 3)
    attend = jax.jit(partial(
        native_sparse_attention, q, k, v, summary_k, summary_v, num_selected=4, window=6, block=BLOCK))

    # To summaries: plain softmax over those that have passed.
    is_past = np.arange(1, count + 1) * BLOCK - 1 <= QUERY
    scores = np.einsum("bthk,bchk->bhtc", q, np.repeat(summary_k, 2, axis=2)) / K**0.5
    weights = np.where(is_past, np.exp(scores), 0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    to_summaries = np.einsum("bhtc,bchk->bthk", weights, np.repeat(summary_v, 2, axis=2))
    # Selected: always the first block, the own and the one before; then the most attended by the group.
    mask = np.zeros((B, H, T, T), bool)
    for b, h, i in np.ndindex(B, H, T):
        own, group = i // BLOCK, [h // 2 * 2, h // 2 * 2 + 1]
        importance = weights[b, group, i].sum(0)
        chosen = {0, own, max(own - 1, 0)}
        others = sorted(set(range(own)) - chosen, key=lambda block: (-importance[block], block))
        chosen |= set(others[: 4 - len(chosen)])
        mask[b, h, i] = [j <= i and j // BLOCK in chosen for j in range(T)]
    in_window = ((KEY <= QUERY) & (QUERY - KEY <= 6))[None, None]
    branches = [to_summaries, _dense(q, k, v, mask), _dense(q, k, v, in_window)]
    for index, branch in enumerate(branches):
        only = jnp.zeros_like(gates).at[..., index].set(1)
        assert_matches(attend(gates=only), branch, dtype="float32", scale=4)
    mixed = sum(np.asarray(gates)[..., [index]] * branch for index, branch in enumerate(branches))
    assert_matches(attend(gates=gates), mixed, dtype="float32", scale=4)


def test_a_query_reads_its_pages_in_any_order_and_shares_them():
    draw = Draw(5)
    page, num_pages = 4, 9
    k_pages, v_pages, q = draw(num_pages, page, N, K), draw(num_pages, page, N, K), draw(3, H, K)
    table = np.array([[7, 2, 5, 0], [7, 3, 0, 0], [8, 0, 0, 0]], np.int32)  # two rows share their first page
    lengths = np.array([11, 6, 1], np.int32)
    positions = np.zeros((num_pages, page), np.int32)
    for row in table:
        for index, at in enumerate(row[row > 0]):
            positions[at] = index * page + np.arange(page)
    run = jax.jit(paged_attention)
    y = run(q, k_pages, v_pages, jnp.asarray(table), jnp.asarray(lengths), jnp.asarray(positions))
    for row, length in enumerate(lengths):
        slots = [(table[row, t // page], t % page) for t in range(length)]
        k, v = (jnp.stack([pages[at] for at in slots])[None] for pages in (k_pages, v_pages))
        expected = attend_reference(q[row][None, None], k, v, jnp.ones((1, 1, 1, length), bool), scale=K**-0.5)
        assert_matches(y[row], expected.o[0, 0], dtype="float32", scale=2)
    fewer = jnp.asarray(lengths - [3, 0, 0])
    shorter = run(q, k_pages, v_pages, jnp.asarray(table), fewer, jnp.asarray(positions))
    assert run._cache_size() == 1, "tables and lengths are values"
    assert not np.array_equal(shorter[0], y[0]) and np.array_equal(shorter[1:], y[1:])


@pytest.mark.parametrize("layer", [
    SparseAttention(num_heads=4, num_key_heads=2, rotary_width=4,
                    attend=partial(moba_attention, top_k=2, block=BLOCK)),
    SparseAttention(num_heads=4, num_key_heads=4, attend=partial(sliding_window_attention, window=6, block=BLOCK)),
    NativeSparseAttention(num_heads=4, num_key_heads=2, num_selected=3, window=5, block=BLOCK, rotary_width=4),
], ids=["moba", "window", "native"])
def test_layers_are_causal_and_train(layer):
    x = Draw(7)(B, T, 16)
    params = jax.jit(layer.init)(jax.random.key(0), x)
    run = jax.jit(lambda params, x: layer.apply(params, x)[0])
    before, after = run(params, x), run(params, x.at[:, 30].add(1))
    np.testing.assert_array_equal(before[:, :30], after[:, :30])
    assert not np.array_equal(before[:, 30:], after[:, 30:])
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(run(params, x) ** 2)))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def test_heads_that_do_not_divide_are_refused():
    layer = SparseAttention(num_heads=4, num_key_heads=3, attend=document_attention)
    with pytest.raises(ValueError, match="num_key_heads 3 must divide num_heads 4, which must divide the width"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 4, 16)))
    with pytest.raises(ValueError, match="top_k 0 must be at least 1"):
        moba_attention(*_inputs(), top_k=0)
    with pytest.raises(ValueError, match="4 summaries; 45 tokens in blocks of 8 make 5"):
        native_sparse_attention(*_inputs(), *[jnp.zeros((B, 4, N, K))] * 2, jnp.zeros((B, T, H, 3)),
                                num_selected=3, window=2, block=8)
