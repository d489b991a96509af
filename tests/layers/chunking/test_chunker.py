import doctest
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import Chunker, StrideRouter
from layers.chunking import chunker as module
from tests.support.inputs import Draw

X = Draw(0)(2, 13, 8)
IDS = jnp.array([[0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0], [1] * 13])


def test_the_example_in_the_docstring_prints_what_it_says():
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS) == (0, 8)


def test_unchunk_hands_tokens_their_chunk_and_the_router_its_gradient():
    chunker = Chunker(router=StrideRouter(3), smoothing=False)
    chunks, unchunk, info = chunker.apply({}, X, IDS)
    assert info.segment_ids.tolist()[0] == [1, 1, 2, 2] + [0] * 9
    y = unchunk(chunks)
    np.testing.assert_array_equal(y[0, 1:4], jnp.broadcast_to(X[0, 1], (3, 8)))
    np.testing.assert_array_equal(y[0, 9], X[0, 9])

    learned = Chunker(smoothing=True)
    params = jax.jit(learned.init)(jax.random.key(0), X, IDS)

    def loss(params):
        chunks, unchunk, _ = learned.apply(params, X, IDS)
        return jnp.sum(unchunk(chunks) * Draw(1)(2, 13, 8))

    assert all((leaf != 0).any() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_what_comes_back_may_leave_a_compiled_function():
    chunker = Chunker(slots_per_token=0.7)
    params = chunker.init(jax.random.key(0), X)
    chunks, unchunk, info = jax.jit(chunker.apply)(params, X)
    assert chunks.shape == (2, 10, 8) and unchunk(chunks).shape == X.shape
    np.testing.assert_allclose(info.ratio_loss(3.0), chunker.apply(params, X)[2].ratio_loss(3.0), rtol=1e-6)


@pytest.mark.parametrize("downsampler", typing.get_args(module.Downsampler))
def test_no_token_reads_the_future(downsampler):
    chunker = Chunker(router=StrideRouter(3), downsampler=downsampler)
    params = chunker.init(jax.random.key(0), X, IDS)

    def read(x):
        chunks, unchunk, _ = chunker.apply(params, x, IDS)
        return unchunk(chunks)

    before, after = read(X), read(X.at[:, 7:].add(1.0))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any()
    foreign = jax.grad(lambda x: jnp.sum(read(x)[0, 6:10]))(X)
    assert (foreign[0, :6] == 0).all() and (foreign[1] == 0).all()  # other segments, other rows


def test_refuses_slots_that_no_row_can_have():
    with pytest.raises(ValueError, match=r"slots_per_token 1.5 must be above 0 and up to 1"):
        Chunker(slots_per_token=1.5).init(jax.random.key(0), X)
