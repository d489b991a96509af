import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import (
    PoolState,
    assign_chunks,
    chunk,
    chunk_pooled,
    dechunk,
    pack_rows,
    pack_segments,
    straight_through,
)
from tests.support.inputs import Draw

ONES = jnp.ones((1, 6), jnp.int32)


def _mask(*rows):
    return jnp.array([[letter == "x" for letter in row] for row in rows])


def test_chunks_take_boundary_tokens_in_order_and_tokens_read_their_chunk():
    plan = assign_chunks(_mask("x.x..x", "x....."), jnp.ones((2, 6), jnp.int32), 4)
    assert plan.token.tolist() == [[0, 2, 5, 6], [0, 6, 6, 6]]
    assert plan.slot.tolist() == [[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]]
    assert plan.segment_ids.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    x = jnp.arange(1.0, 13).reshape(2, 6, 1)
    assert chunk(x, plan)[..., 0].tolist() == [[1, 3, 6, 0], [7, 0, 0, 0]]


def test_overflow_demotes_later_boundaries_and_counts_them():
    plan = assign_chunks(_mask("xxx.x.", "x....."), jnp.ones((2, 6), jnp.int32), 2)
    assert plan.num_overflow.tolist() == [2, 0]
    assert plan.starts_chunk.tolist() == _mask("xx....", "x.....").tolist()
    assert plan.slot.tolist()[0] == [0, 1, 1, 1, 1, 1]


def test_a_segment_without_a_slot_reads_nothing_rather_than_its_neighbours_chunk():
    ids = jnp.array([[1, 1, 1, 2, 2, 0]])
    plan = assign_chunks(_mask("xx.x.x"), ids, 2)
    assert plan.slot.tolist() == [[0, 1, 1, 2, 2, 2]]
    y, _ = dechunk(jnp.ones((1, 2, 3)), jnp.full((1, 6), 0.9), plan)
    assert (y[0, 3:] == 0).all() and (y[0, :3] > 0.8).all()


@pytest.mark.parametrize("capacity", [0, 7])
def test_refuses_a_capacity_that_rows_cannot_have(capacity):
    with pytest.raises(ValueError, match="between 1 and the 6 tokens"):
        assign_chunks(_mask("x....."), ONES, capacity)


def test_smoothing_never_reaches_across_segments():
    plan = assign_chunks(_mask("xx.xx."), jnp.array([[1, 1, 1, 2, 2, 2]]), 6)
    p = jnp.array([[1, 0.6, 0, 1, 0.7, 0]])
    read = lambda z: dechunk(z, p, plan)[0][0, 3:].sum()  # noqa: E731
    gradient = jax.grad(read)(jnp.ones((1, 6, 2)))
    assert (gradient[0, :2] == 0).all() and (gradient[0, 2:4] > 0).all()


def test_straight_through_is_exactly_one_with_the_gradient_of_p():
    p = Draw(0).uniform(1000)
    assert (straight_through(p) == 1).all()
    assert (jax.grad(lambda p: straight_through(p).sum())(p) == 1).all()


def test_a_row_that_goes_on_reads_its_chunk_until_the_next_boundary():
    plan = assign_chunks(_mask("..x..", "....."), jnp.array([[1] * 5, [1] * 3 + [0] * 2]), 5)
    value = jnp.array([[2.0], [3.0]])
    y, last = dechunk(jnp.ones((2, 5, 1)), jnp.full((2, 5), 0.75), plan, initial_value=value)
    assert y[0, :, 0].tolist() == [2, 2, 1.25, 1.25, 1.25] and y[1, :3, 0].tolist() == [3, 3, 3]
    assert last[:, 0].tolist() == [1.25, 3]


def test_a_row_that_goes_on_may_begin_only_the_chunks_it_has_left():
    ids = jnp.ones((3, 6), jnp.int32)
    plan = assign_chunks(_mask(".x.x.x", "xx....", ".x...."), ids, 6, num_before=jnp.array([3, 5, 2]), limit=5)
    assert plan.starts_chunk.tolist() == _mask(".x.x..", "......", ".x....").tolist()
    assert plan.num_overflow.tolist() == [1, 2, 0]
    assert plan.slot.tolist() == [[6, 0, 0, 1, 1, 1], [6] * 6, [6, 0, 0, 0, 0, 0]]  # 6: the chunk it came in with


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_slot_holds_the_chunk_before_it_in_its_own_segment(pooling):
    ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    plan = assign_chunks(_mask("x.xxx.x."), ids, 6)
    x = jnp.arange(1.0, 9)[None, :, None]
    slots, after = chunk_pooled(x, plan, ids, pooling=pooling)
    of = {"mean": lambda *z: sum(z) / len(z), "max": max}[pooling]
    assert slots[0, :, 0].tolist() == [0, of(1, 2), 3, 0, of(5, 6), 0]
    assert after.count.tolist() == [1] and after.total.tolist() == [[7]]


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooling_token_by_token_equals_pooling_at_once(pooling):
    x, boundary = Draw(0)(2, 9, 3) - 2, _mask("x..x.xx..", "xx.......")  # negative: 0 must not win as a maximum
    ones = jnp.ones((2, 9), jnp.int32)
    whole, last = chunk_pooled(x, assign_chunks(boundary, ones, 9), ones, pooling=pooling)
    state, found = PoolState.empty(2, 3), [[], []]
    for t in range(9):
        plan = assign_chunks(boundary[:, t : t + 1], ones[:, :1], 1)
        slot, state = chunk_pooled(x[:, t : t + 1], plan, ones[:, :1], pooling=pooling, state=state)
        for row in np.flatnonzero(boundary[:, t]):
            found[row].append(slot[row, 0])
    for row in range(2):
        np.testing.assert_allclose(jnp.stack(found[row]), whole[row, : len(found[row])], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, last)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooled_gradients_are_finite_and_reach_each_token_of_a_chunk_that_ended(pooling):
    ids = jnp.array([[1, 1, 1, 1, 1, 0]])
    plan = assign_chunks(_mask("x..x.."), ids, 6)
    gradient = jax.grad(lambda x: chunk_pooled(x, plan, ids, pooling=pooling)[0].sum())(Draw(0)(1, 6, 4))
    assert np.isfinite(gradient).all() and (gradient[0, 3:] == 0).all()
    np.testing.assert_allclose(gradient[0, :3].sum(0), 1, atol=1e-6)


def test_without_smoothing_tokens_read_their_chunk_itself():
    plan = assign_chunks(_mask("x.x..x"), ONES, 6)
    z = Draw(0)(1, 6, 2)
    y, last = dechunk(z, jnp.full((1, 6), 0.7), plan, smoothing=False)
    np.testing.assert_array_equal(y[0], z[0, jnp.array([0, 0, 1, 1, 1, 2])])
    np.testing.assert_array_equal(last, z[:, 2])


def test_packed_rows_keep_their_segments_apart():
    ids = jnp.array([[0, 3, 3, 5], [7, 7, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]])
    packed = np.asarray(pack_segments(ids, 2))
    assert packed.shape == (2, 8)
    np.testing.assert_array_equal(packed.reshape(4, 4) == 0, ids == 0)
    for buffer in packed:  # contiguous and unique: each non-zero id is one run
        runs = buffer[np.flatnonzero(np.diff(buffer, prepend=-1))]
        assert len(set(runs[runs != 0])) == (runs != 0).sum()
    assert len(set(packed[0][packed[0] != 0])) == 3 and len(set(packed[1][packed[1] != 0])) == 1
    x = Draw(0)(4, 4, 2)
    np.testing.assert_array_equal(pack_rows(x, 2).reshape(4, 4, 2), x)
