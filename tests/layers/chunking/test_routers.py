import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import (
    CosineRouter,
    GivenRouter,
    RouterHints,
    SpaceRouter,
    StrideRouter,
    boundary_probability,
    is_spacelike,
)
from layers.chunking.routers import NO_HINTS
from tests.support.inputs import Draw

ONES = jnp.ones((1, 6), jnp.int32)


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


def test_router_starts_as_the_raw_cosine():
    x = Draw(3)(1, 6, 8)
    router = CosineRouter()
    p, _ = router.apply(router.init(jax.random.key(0), x, ONES), x, ONES)
    np.testing.assert_allclose(p, boundary_probability(x, x, ONES), atol=1e-6)


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


TEXT = b"def f(x):  # gr\xc3\xbcn 42"
TOKENS = jnp.array([list(TEXT)])


def test_spacelike_bytes_are_neither_letters_nor_digits_nor_continuations():
    for byte, expected in ((b" ", True), (b"_", True), (b"\n", True), (b"a", False), (b"Z", False), (b"0", False),
                           (b"\xc3", True), (b"\xbc", False), (b"\xfe", True), (b"@", True), (b"[", True)):
        assert bool(is_spacelike(jnp.array([list(byte)]))[0, 0]) is expected, byte


def _starts(router, segment_ids, hints=NO_HINTS):
    x = jnp.zeros((*segment_ids.shape, 4))
    p, _ = router.apply({}, x, segment_ids, hints)
    assert set(np.unique(p)) <= {0.0, 1.0}
    return np.flatnonzero(p[0]).tolist()


def test_the_space_router_cuts_after_words():
    ones = jnp.ones(TOKENS.shape, jnp.int32)
    # "def| f|(x|):  # gr|\xc3\xbcn| 42": a run of spacelike bytes is cut once, at its start.
    assert _starts(SpaceRouter(), ones, RouterHints(tokens=TOKENS)) == [0, 3, 5, 7, 15, 18]


def test_the_stride_router_counts_from_the_start_of_each_segment():
    assert _starts(StrideRouter(3), jnp.array([[0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])) == [1, 4, 5, 8]


def test_the_given_router_cuts_where_it_is_told_and_at_segment_starts():
    levels = jnp.array([[0, 0, 2, 0, 1, 0, 1]])
    ids = jnp.array([[1, 1, 1, 1, 1, 2, 0]])
    assert _starts(GivenRouter(), ids, RouterHints(boundary_levels=levels)) == [0, 2, 4, 5]


@pytest.mark.parametrize(("router", "message"), [
    (SpaceRouter(), "needs the bytes"), (GivenRouter(), "needs boundary_levels")])
def test_a_router_says_what_it_lacks(router, message):
    with pytest.raises(ValueError, match=message):
        _starts(router, ONES)


# One segment per row; segments that begin at the start of a piece and amid one, with and without padding between.
SEVERAL = np.array([[3] * 7 + [4] * 3 + [5] * 11, [0] + [2] * 4 + [0] * 8 + [7] * 8])


@pytest.mark.parametrize("ids", [np.ones_like(SEVERAL), SEVERAL], ids=["one segment", "several"])
@pytest.mark.parametrize("router", [CosineRouter(), StrideRouter(3), SpaceRouter(), GivenRouter()])
def test_a_router_in_pieces_of_any_size_cuts_as_it_does_at_once(router, ids):
    length, ids = TOKENS.shape[1], jnp.asarray(ids, jnp.int32)
    hints = RouterHints(jnp.tile(TOKENS, (2, 1)), jnp.array(np.random.default_rng(0).integers(0, 2, (2, length))))
    x = Draw(0)(2, length, 4)
    params = router.init(jax.random.key(0), x, ids, hints)
    whole, _ = router.apply(params, x, ids, hints)
    state, pieces = router.empty_state(2, 4), []
    for start, stop in ((0, 1), (1, 2), (2, 7), (7, 7 + 9), (16, length)):
        piece = RouterHints(*(z[:, start:stop] for z in hints))
        p, state = router.apply(params, x[:, start:stop], ids[:, start:stop], piece, state)
        pieces.append(p)
        padding = RouterHints(*(z[:, :2] for z in hints))
        idle, state = router.apply(params, x[:, :2], 0 * ids[:, :2], padding, state)
        assert (idle == 0).all()
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-6)
