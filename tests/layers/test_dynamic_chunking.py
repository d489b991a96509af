from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import (
    CosineRouter,
    assign_chunks,
    boundary_probability,
    chunk,
    dechunk,
    ratio_loss,
    smooth,
    straight_through,
)
from tests.assertions import assert_matches
from tests.inputs import Draw

ONES = jnp.ones((1, 6), jnp.int32)


def _mask(*rows):
    return jnp.array([[letter == "x" for letter in row] for row in rows])


def test_probability_is_half_the_cosine_distance_of_neighbours():
    q = jnp.array([[[1.0, 0], [1, 0], [0, 2], [3, 0], [0, 0], [1, 1]]])
    p = boundary_probability(q, q, ONES)
    np.testing.assert_allclose(p, [[1, 0, 0.5, 0.5, 0.5, 0.5]], atol=1e-7)
    assert boundary_probability(q, -q, ONES)[0, 1] == 1


def test_query_belongs_to_the_earlier_token():
    q = jnp.array([[[1.0, 0], [0, 1]]])
    k = jnp.array([[[0.0, 1], [1, 0]]])
    assert boundary_probability(q, k, ONES[:, :2])[0, 1] == 0  # q_0 . k_1 = 1; q_1 . k_0 would be 1 too
    assert boundary_probability(q, q, ONES[:, :2])[0, 1] == 0.5


def test_segment_starts_are_certain_without_gradient_and_padding_is_never_a_boundary():
    ids = jnp.array([[0, 1, 1, 2, 2, 0]])
    x = Draw(0)(1, 6, 4)
    p = boundary_probability(x, x, ids)
    assert list(p[0, jnp.array([0, 1, 3, 5])]) == [0, 1, 1, 0]
    across = jax.grad(lambda x: boundary_probability(x, x, ids)[0, 3])(x)
    assert (across == 0).all()


def test_zero_and_repeated_vectors_have_finite_gradients():
    zero = jax.grad(lambda x: boundary_probability(x, x, ONES).sum())(jnp.zeros((1, 6, 4)))
    assert np.isfinite(zero).all()
    # At a cosine of exactly 1 the clamp must pass the gradient on, as torch's does, not half of it.
    x = jnp.zeros((1, 6, 4)).at[..., 0].set(1.0)
    other = x.at[..., 1].set(0.1)
    through_tie = jax.jvp(lambda k: boundary_probability(x, k, ONES), (x,), (other,))[1]
    inside = jax.jvp(lambda k: -jnp.einsum("btd,btd->bt", x, k / jnp.linalg.norm(k, axis=-1, keepdims=True)) / 2,
                     (x,), (other,))[1]
    np.testing.assert_allclose(through_tie[:, 1:], inside[:, 1:], atol=1e-7)


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


@pytest.mark.parametrize("c", [1, 7, 64])
def test_associative_smoothing_matches_reference_in_value_and_gradient(c):
    draw = Draw(seed=c)
    z, dy = draw(2, c, 5), draw(2, c, 5)
    p = draw.uniform(2, c).at[:, c // 2].set(1.0).at[:, c // 3].set(0.0)
    restarts = (draw.uniform(2, c) < 0.2).at[:, 0].set(True)

    @partial(jax.jit, static_argnums=0)
    def value_and_gradient(implementation):
        y, vjp = jax.vjp(partial(smooth, restarts=restarts, implementation=implementation), z, p)
        return y, vjp(dy)

    assert_matches(value_and_gradient("associative"), value_and_gradient("reference"), dtype="float32")


def test_smoothing_keeps_the_clamp_of_the_release():
    z = jnp.ones((1, 3, 1))
    y = smooth(z, jnp.array([[1.0, 0.0, 0.5]]), jnp.array([[True, False, False]]), implementation="reference")
    s0 = 1 - 1e-4
    s1 = 1e-4 + s0 * (1 - 1e-4)
    np.testing.assert_allclose(y[0, :, 0], [s0, s1, 0.5 + 0.5 * s1], rtol=1e-6)


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


def test_ratio_loss_is_one_at_its_target_and_counts_real_tokens_only():
    p = jnp.array([[1, 0.0, 0.0, 0.0] * 2])
    mask = jnp.ones((1, 8), bool)
    np.testing.assert_allclose(ratio_loss(p, p > 0.5, mask, 4.0), 1.0, rtol=1e-6)
    padded = ratio_loss(jnp.pad(p, ((0, 0), (0, 8))), jnp.pad(p > 0.5, ((0, 0), (0, 8))),
                        jnp.pad(mask, ((0, 0), (0, 8))), 4.0)
    np.testing.assert_allclose(padded, 1.0, rtol=1e-6)
    assert ratio_loss(p, p > 0.5, mask, 8.0) > 1


def test_ratio_loss_pushes_probabilities_by_the_realised_fraction():
    """d loss / d G = N (N F - 1) / (N - 1): up when there are too few boundaries, and none through F."""
    p = jnp.array([[1, 0.2, 0.3, 0.4, 0.2, 0.1, 0.3, 0.2]])
    gradient = jax.grad(lambda p: ratio_loss(p, p > 0.5, jnp.ones((1, 8), bool), 4.0))(p)
    np.testing.assert_allclose(gradient, np.full((1, 8), 4 * (4 / 8 - 1) / 3 / 8), rtol=1e-5)


def test_router_starts_as_the_raw_cosine():
    x = Draw(3)(1, 6, 8)
    router = CosineRouter()
    p, _ = router.apply(router.init(jax.random.key(0), x, ONES), x, ONES)
    np.testing.assert_allclose(p, boundary_probability(x, x, ONES), atol=1e-6)


def test_a_row_that_goes_on_reads_its_chunk_until_the_next_boundary():
    plan = assign_chunks(_mask("..x..", "....."), jnp.array([[1] * 5, [1] * 3 + [0] * 2]), 5)
    value = jnp.array([[2.0], [3.0]])
    y, last = dechunk(jnp.ones((2, 5, 1)), jnp.full((2, 5), 0.75), plan, initial_value=value)
    assert y[0, :, 0].tolist() == [2, 2, 1.25, 1.25, 1.25] and y[1, :3, 0].tolist() == [3, 3, 3]
    assert last[:, 0].tolist() == [1.25, 3]


def test_a_router_goes_on_from_the_last_real_token():
    x = Draw(4)(2, 8, 6)
    router = CosineRouter()
    params = router.init(jax.random.key(0), x, jnp.ones((2, 8), jnp.int32))
    whole, _ = router.apply(params, x, jnp.ones((2, 8), jnp.int32))
    first, state = router.apply(params, x[:, :4], jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]]))
    idle, state = router.apply(params, x[:, :2], jnp.zeros((2, 2), jnp.int32), state=state)
    assert (idle == 0).all()
    rest = jnp.stack([x[0, 4:], x[1, 2:6]])
    second, _ = router.apply(params, rest, jnp.ones((2, 4), jnp.int32), state=state)
    np.testing.assert_allclose(jnp.concatenate([first[0], second[0]]), whole[0], atol=1e-6)
    np.testing.assert_allclose(jnp.concatenate([first[1, :2], second[1]]), whole[1, :6], atol=1e-6)
