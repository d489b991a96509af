import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import Partition, chunk, pack_rows, pack_segments
from tests.support.inputs import Draw

ONES = jnp.ones((1, 6), jnp.int32)


def _mask(*rows):
    return jnp.array([[letter == "x" for letter in row] for row in rows])


def _starts(partition, row=0):
    return np.flatnonzero(partition.starts_chunk[row]).tolist()


def test_chunks_take_boundary_tokens_in_order_and_tokens_read_their_chunk():
    partition = Partition.from_boundaries(_mask("x.x..x", "x....."), jnp.ones((2, 6), jnp.int32), 4)
    assert partition.first_token.tolist() == [[0, 2, 5, 6], [0, 6, 6, 6]]
    assert partition.slot.tolist() == [[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]]
    assert partition.chunk_segment_ids.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    x = jnp.arange(1.0, 13).reshape(2, 6, 1)
    assert chunk(x, partition)[..., 0].tolist() == [[1, 3, 6, 0], [7, 0, 0, 0]]


def test_overflow_demotes_later_boundaries_and_counts_them():
    partition = Partition.from_boundaries(_mask("xxx.x.", "x....."), jnp.ones((2, 6), jnp.int32), 2)
    assert partition.num_overflow.tolist() == [2, 0]
    assert partition.starts_chunk.tolist() == _mask("xx....", "x.....").tolist()
    assert partition.slot.tolist()[0] == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("num_slots", [0, 7])
def test_refuses_a_number_of_slots_that_rows_cannot_have(num_slots):
    with pytest.raises(ValueError, match="between 1 and the 6 tokens"):
        Partition.from_boundaries(_mask("x....."), ONES, num_slots)


def test_a_row_that_goes_on_may_begin_only_the_chunks_it_has_left():
    ids = jnp.ones((3, 6), jnp.int32)
    partition = Partition.from_boundaries(
        _mask(".x.x.x", "xx....", ".x...."), ids, 6, last_segment=jnp.ones(3, jnp.int32),
        num_before=jnp.array([3, 5, 2]), max_chunks=5)
    assert partition.starts_chunk.tolist() == _mask(".x.x..", "......", ".x....").tolist()
    assert partition.num_overflow.tolist() == [1, 2, 0]
    assert partition.slot.tolist() == [[6, 0, 0, 1, 1, 1], [6] * 6, [6, 0, 0, 0, 0, 0]]
    assert partition.is_carried.tolist() == _mask("x.....", "xxxxxx", "x.....").tolist()


def test_each_segment_of_a_row_has_its_own_limit():
    ids = jnp.array([[5, 5, 5, 6, 6, 6]])
    partition = Partition.from_boundaries(
        _mask(".x.xxx"), ids, 6, last_segment=jnp.array([5]), num_before=jnp.array([2]), max_chunks=2)
    assert _starts(partition) == [3, 4] and partition.num_overflow.tolist() == [2]
    assert partition.slot.tolist() == [[6, 6, 6, 0, 1, 1]] and partition.place.tolist() == [[0, 0, 0, 1, 2, 2]]


def test_only_the_first_segment_continues_and_only_if_it_is_the_one_the_row_was_in():
    ids = jnp.array([[0, 3, 3, 3, 4, 4]] * 2 + [[0] * 6])
    partition = Partition.from_boundaries(
        _mask(*["...xx."] * 3), ids, 6, last_segment=jnp.array([3, 2, 3]))
    assert partition.carried_segment.tolist() == [3, 0, 0]
    assert partition.is_carried.tolist() == _mask(".xx...", "......", "......").tolist()
    assert partition.begins_segment.tolist() == _mask(".x....", "xx....", "......").tolist()
    assert partition.place.tolist()[0] == [7, 0, 0, 1, 2, 2] and partition.place.tolist()[1] == [7, 7, 7, 1, 2, 2]
    assert partition.last_place.tolist() == [2, 2, 0]  # a row of padding stays where it was


def test_fixed_chunks_count_from_the_start_of_each_segment():
    ids = jnp.array([[0, 1, 1, 1, 1, 1, 2, 2, 2, 0]])
    partition = Partition.fixed(ids, 2)
    assert _starts(partition) == [1, 3, 5, 6, 8]
    assert partition.chunk_segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0, 0, 0, 0]]
    assert Partition.fixed(ids, 2, 3).num_overflow.tolist() == [2]


def test_blocks_keep_their_slots_whatever_the_row_holds():
    ids = jnp.array([[0, 1, 1, 2, 0, 0, 0, 0, 3, 3, 3]])
    partition = Partition.blocks(ids, 4)
    assert partition.first_token.tolist() == [[1, 11, 8]] and _starts(partition) == [1, 8]
    assert partition.slot.tolist() == [[3, 0, 0, 0, 3, 3, 3, 3, 2, 2, 2]]
    assert partition.is_chunk.tolist() == [[True, False, True]]


def test_the_highest_scores_start_chunks_and_suppress_their_neighbours():
    scores = jnp.array([[0.0, 9, 1, 5, 4, 3, 8, 2]])
    ids = jnp.ones((1, 8), jnp.int32)
    assert _starts(Partition.from_scores(scores, ids, 3)) == [0, 1, 6]
    assert _starts(Partition.from_scores(scores, ids, 8, min_distance=2)) == [0, 3, 6]  # 1 and 7 are too near
    assert _starts(Partition.from_scores(scores, ids, 8, min_distance=4)) == [0, 6]
    assert _starts(Partition.from_scores(scores, ids, 8, threshold=4.0)) == [0, 1, 3, 4, 6]


def test_scores_suppress_only_in_their_own_segment_and_every_segment_starts():
    scores = jnp.array([[0.0, 1, 9, 0, 9, 9, 0, -jnp.inf]])
    ids = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    partition = Partition.from_scores(scores, ids, 8, min_distance=2)
    assert _starts(partition) == [0, 2, 3, 5]
    assert _starts(Partition.from_scores(scores, ids, 2)) == [0, 3]


def test_greedy_suppression_equals_a_loop_in_numpy():
    scores = np.asarray(Draw(0)(3, 40))
    ids = jnp.ones((3, 40), jnp.int32)
    partition = jax.jit(lambda scores: Partition.from_scores(scores, ids, 9, min_distance=3))(scores)
    for row in range(3):
        chosen = [0]
        for token in np.argsort(-scores[row], kind="stable"):
            if len(chosen) < 9 and min(abs(token - other) for other in chosen) >= 3:
                chosen.append(int(token))
        assert _starts(partition, row) == sorted(chosen)


def test_ids_start_a_chunk_where_they_change_and_at_segment_starts():
    chunk_ids = jnp.array([[7, 7, 3, 3, 3, 0, 3, 5]])
    assert _starts(Partition.from_ids(chunk_ids)) == [0, 2, 6, 7]
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    partition = Partition.from_ids(chunk_ids, segment_ids, 5)
    assert _starts(partition) == [0, 2, 3, 6] and partition.slot.tolist() == [[0, 0, 1, 2, 2, 5, 3, 5]]


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
