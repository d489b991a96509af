import jax
import jax.numpy as jnp
import numpy as np

from layers import Partition, dechunk, straight_through
from tests.support.inputs import Draw

ONES = jnp.ones((1, 6), jnp.int32)


def _mask(*rows):
    return jnp.array([[letter == "x" for letter in row] for row in rows])


def test_a_segment_without_a_slot_reads_nothing_rather_than_its_neighbours_chunk():
    ids = jnp.array([[1, 1, 1, 2, 2, 0]])
    partition = Partition.from_boundaries(_mask("xx.x.x"), ids, 2)
    assert partition.slot.tolist() == [[0, 1, 1, 2, 2, 2]]
    y, last = dechunk(jnp.ones((1, 2, 3)), jnp.full((1, 6), 0.9), partition)
    assert (y[0, 3:] == 0).all() and (y[0, :3] > 0.8).all()
    assert (last == 0).all()  # what comes after belongs to the segment without a chunk


def test_smoothing_never_reaches_across_segments():
    partition = Partition.from_boundaries(_mask("xx.xx."), jnp.array([[1, 1, 1, 2, 2, 2]]), 6)
    p = jnp.array([[1, 0.6, 0, 1, 0.7, 0]])
    read = lambda z: dechunk(z, p, partition)[0][0, 3:].sum()  # noqa: E731
    gradient = jax.grad(read)(jnp.ones((1, 6, 2)))
    assert (gradient[0, :2] == 0).all() and (gradient[0, 2:4] > 0).all()


def test_straight_through_is_exactly_one_with_the_gradient_of_p():
    p = Draw(0).uniform(1000)
    assert (straight_through(p) == 1).all()
    assert (jax.grad(lambda p: straight_through(p).sum())(p) == 1).all()


def test_a_row_that_goes_on_reads_its_chunk_until_the_next_boundary():
    partition = Partition.from_boundaries(
        _mask("..x..", ".....", "....."), jnp.array([[1] * 5, [1] * 3 + [0] * 2, [0] * 5]), 5,
        last_segment=jnp.ones(3, jnp.int32))
    value = jnp.array([[2.0], [3.0], [4.0]])
    y, last = dechunk(jnp.ones((3, 5, 1)), jnp.full((3, 5), 0.75), partition, initial_value=value)
    assert y[0, :, 0].tolist() == [2, 2, 1.25, 1.25, 1.25] and y[1, :3, 0].tolist() == [3, 3, 3]
    assert last[:, 0].tolist() == [1.25, 3, 4]


def test_a_row_that_begins_another_segment_reads_and_averages_nothing_of_the_old_one():
    boundaries, ids = _mask(".x.x.", "..x.."), jnp.array([[5, 5, 5, 6, 6], [6, 6, 6, 6, 0]])
    partition = Partition.from_boundaries(boundaries, ids, 5, last_segment=jnp.array([5, 5]))
    value = jnp.array([[2.0], [3.0]])
    y, last = dechunk(jnp.ones((2, 5, 1)), jnp.full((2, 5), 0.75), partition, initial_value=value)
    assert y[0, :, 0].tolist() == [2, 1.25, 1.25, 0.75, 0.75]
    assert y[1, :4, 0].tolist() == [0, 0, 0.75, 0.75]
    assert last[:, 0].tolist() == [0.75, 0.75]


def test_without_smoothing_tokens_read_their_chunk_itself():
    partition = Partition.from_boundaries(_mask("x.x..x"), ONES, 6)
    z = Draw(0)(1, 6, 2)
    y, last = dechunk(z, jnp.full((1, 6), 0.7), partition, smoothing=False)
    np.testing.assert_array_equal(y[0], z[0, jnp.array([0, 0, 1, 1, 1, 2])])
    np.testing.assert_array_equal(last, z[:, 2])
