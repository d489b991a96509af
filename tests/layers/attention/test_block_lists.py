"""Lists of blocks: from block masks, scores and masks; their algebra; and errors about wrong ones."""
import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from layers import CAUSAL, SAME_SEGMENT, Bits, BlockLists, Window, token_info
from layers.attention.block_sparse.tiles import ALL, NOTHING, make_tiles, transpose
from layers.attention.mask import pairs
from tests.support.inputs import Draw

BLOCKS = dict(block_q=4, block_k=8)


def _mask(seed: int, *shape: int, density: float = 0.5) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).random(shape) < density)


def test_a_mask_comes_back_from_its_lists_and_twice_transposed():
    mask = _mask(0, 2, 3, 5, 7)
    lists = BlockLists.from_block_mask(mask, **BLOCKS)
    np.testing.assert_array_equal(lists.to_dense(), mask)
    across = lists.transpose()
    assert (across.block_q, across.block_k, across.num_query_blocks, across.num_key_blocks) == (8, 4, 7, 5)
    np.testing.assert_array_equal(across.to_dense(), mask.swapaxes(-1, -2))
    np.testing.assert_array_equal(across.transpose().to_dense(), mask)


def test_what_max_blocks_cuts_off_is_counted():
    mask = _mask(1, 2, 1, 6, 9, density=0.7)
    lists = BlockLists.from_block_mask(mask, max_blocks=3, **BLOCKS)
    assert lists.ids.shape[-1] == 3 and lists.overflow.sum() > 0
    np.testing.assert_array_equal(lists.counts + lists.overflow, mask.sum(-1))
    np.testing.assert_array_equal(lists.to_dense(), mask & (jnp.cumsum(mask, axis=-1) <= 3))


def test_lists_of_both_are_those_of_the_masks_in_common():
    one, other = _mask(2, 1, 4, 5, 7), _mask(3, 2, 1, 5, 7)
    both = BlockLists.from_block_mask(one, **BLOCKS).intersect(BlockLists.from_block_mask(other, **BLOCKS))
    np.testing.assert_array_equal(both.to_dense(), one & other)
    with pytest.raises(ValueError, match=r"lists of different blocks: .* are \(4, 8, 5, 7\) and \(4, 4, 5, 7\)"):
        both.intersect(BlockLists.from_block_mask(other, block_q=4, block_k=4))


def test_the_k_best_blocks_and_the_lower_of_equals():
    scores = jnp.array([3.0, 1.0, 3.0, -jnp.inf, 2.0]).reshape(1, 1, 1, 5)

    def chosen(k, scores=scores):
        lists = BlockLists.from_top_k(scores, k, block_q=40, block_k=8)
        return np.flatnonzero(lists.to_dense()).tolist()

    assert [chosen(1), chosen(2), chosen(3), chosen(9)] == [[0], [0, 2], [0, 2, 4], [0, 1, 2, 4]]


def test_top_k_is_causal_by_the_last_query_of_a_block():
    lists = BlockLists.from_top_k(Draw(0)(1, 2, 6, 4), 4, block_q=4, block_k=6)
    last_query, first_key = np.arange(1, 7) * 4 - 1, np.arange(4) * 6
    np.testing.assert_array_equal(
        lists.to_dense(), np.broadcast_to(first_key <= last_query[:, None], (1, 2, 6, 4)))


@pytest.mark.parametrize(("mask", "offset"), [
    (CAUSAL, 0), (CAUSAL & Window(9), 0), (CAUSAL & Window(0), 0), (Window(5), 0), (CAUSAL, 17), (SAME_SEGMENT, 0),
    (CAUSAL & (Window(3) | Bits()), 0)])
def test_lists_of_a_mask_name_every_block_with_an_allowed_pair_and_have_no_room_to_spare(mask, offset):
    q, kv = (token_info(length, positions=np.arange(start, start + length)[None],
                        bits=(np.arange(length) < 4).astype(np.int32)[None])
             for length, start in ((30, offset), (50, 0)))
    lists = jax.jit(lambda: BlockLists.from_mask(mask, q, kv, **BLOCKS))()
    allowed = np.asarray(pairs(mask, q, kv))
    allowed = np.pad(allowed, ((0, 0), (0, 0), (0, 2), (0, 6))).reshape(1, 1, 8, 4, 7, 8).any(axis=(3, 5))
    np.testing.assert_array_equal(lists.to_dense(), allowed)
    assert lists.ids.shape[-1] == max(allowed.sum(-1).max(), 1)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
@hypothesis.given(seed=st.integers(0, 10_000), mask=st.sampled_from([
    SAME_SEGMENT, CAUSAL & SAME_SEGMENT, CAUSAL & SAME_SEGMENT & Window(0), SAME_SEGMENT & Window(3),
    CAUSAL & Window(11), CAUSAL, Window(11), Bits(), CAUSAL & (Window(3) | Bits()), Bits() | SAME_SEGMENT]))
def test_bounds_never_call_an_allowed_tile_empty_nor_a_forbidden_pair_full(seed, mask):
    rng = np.random.default_rng(seed)
    t, s, p = 24, 40, 1 + seed % 2
    q, kv = (token_info(
        length, positions=(np.sort if seed % 3 else np.asarray)(rng.integers(0, 40, (2, p, length))),
        segment_ids=np.repeat(rng.integers(0, 3, (2, length // block)), block, axis=1),
        bits=np.repeat(rng.integers(0, 8, (2, length // block)), block, axis=1))
        for length, block in ((t, 4), (s, 8)))
    lists = BlockLists.from_block_mask(jnp.ones((1, 1, 6, 5), bool), **BLOCKS)
    tiles = make_tiles(lists, mask, q, kv, batch=2)
    kinds = np.zeros((2, p, 6, 5), np.int32)
    np.put_along_axis(kinds, np.asarray(tiles.ids), np.asarray(tiles.kinds), axis=-1)
    allowed = np.broadcast_to(pairs(mask, q, kv), (2, p, t, s)).reshape(2, p, 6, 4, 5, 8)
    assert not (allowed.any(axis=(3, 5)) & (kinds == NOTHING)).any()
    assert allowed.all(axis=(3, 5))[kinds == ALL].all()


def test_a_choice_of_each_query_makes_lists_of_what_its_block_chose():
    chosen = _mask(5, 2, 1, 10, 34, density=0.1)
    lists = BlockLists.from_query_mask(chosen, **BLOCKS)
    by_block = np.pad(chosen, ((0, 0), (0, 0), (0, 2), (0, 0))).reshape(2, 1, 3, 4, 34).any(axis=3)
    np.testing.assert_array_equal(lists.to_dense(), by_block)
    assert lists.rows.shape == (2, 1, 2, 10)
    with pytest.raises(ValueError, match="have no transpose"):
        lists.transpose()


def test_tiles_transposed_keep_their_kinds():
    rng = np.random.default_rng(0)
    kinds = jnp.asarray(rng.integers(0, 3, (2, 2, 5, 6)), jnp.int32)
    ids = jnp.broadcast_to(jnp.asarray(rng.permutation(6), jnp.int32), kinds.shape)
    back_ids, back_kinds = transpose(*transpose(ids, kinds, 6), 5)
    order = jnp.argsort(back_ids, axis=-1)
    in_order = kinds[..., jnp.argsort(ids[0, 0, 0])]
    np.testing.assert_array_equal(jnp.take_along_axis(back_kinds, order, axis=-1), in_order)


WRONG = {
    "entries name no block, the first is 7; there are blocks 0 .. 6": ([2], [0, 7, 0]),
    "the first is -1": ([1], [-1, 0, 0]),
    "counts range over 4 .. 4; lists have room for 0 .. 3": ([4], [0, 1, 2]),
    "a list names a block twice": ([2], [3, 3, 0]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_lists_are_refused_where_they_are_known(message):
    counts, ids = (np.array(values, np.int32) for values in WRONG[message])
    with pytest.raises(ValueError, match=message):
        BlockLists.from_ids(counts[None, None], ids[None, None, None], num_key_blocks=7, **BLOCKS)


def test_traced_entries_that_name_no_block_are_left_out_and_counted():
    @jax.jit
    def make(counts, ids):
        lists = BlockLists.from_ids(counts, ids, num_key_blocks=7, **BLOCKS)
        return lists.to_dense(), lists.overflow

    dense, overflow = make(jnp.array([[[3, 9]]]), jnp.array([[[[0, 7, 5], [-2, 1, 2]]]]))
    assert np.argwhere(dense[0, 0]).tolist() == [[0, 0], [0, 5], [1, 1], [1, 2]]
    assert overflow.tolist() == [[[1, 7]]]


def test_lists_are_pytrees_whose_block_sizes_are_static():
    lists = BlockLists.from_block_mask(_mask(0, 1, 1, 2, 2), **BLOCKS)
    assert len(jax.tree.leaves(lists)) == 3
    assert jax.jit(lambda lists: lists)(lists).block_k == 8
    assert jax.tree.structure(lists) != jax.tree.structure(dataclasses.replace(lists, block_k=4))
