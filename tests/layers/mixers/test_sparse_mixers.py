"""Sparse attention as a mixer: whole rows, rows read in parts from a cache, and packed rows."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import NativeSparseAttention, SparseAttention, document_attention, moba_attention, moba_in_segments
from tests.support.assertions import assert_matches
from tests.support.inputs import Draw

B, D, T, BLOCK = 2, 12, 17, 3
MOBA = dict(top_k=2, block=BLOCK)
LAYERS = {
    "moba": SparseAttention(num_heads=4, num_key_heads=2, attend=partial(moba_attention, **MOBA), rotary_width=2,
                            attend_in_segments=partial(moba_in_segments, **MOBA)),
    "nsa": NativeSparseAttention(
        num_heads=4, num_key_heads=2, num_selected=3, window=2, block=BLOCK, rotary_width=2),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
DOCUMENTS = jnp.array([[4] * 8 + [2] * 7 + [0] * 2, [0] + [1] * 4 + [7] + [3] * 11])


def _params(layer, x):
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    draw = Draw(1)
    return jax.tree.map(lambda leaf: 0.7 * draw(*leaf.shape), shapes)


def _in_parts(layer, params, x, ids, cuts):
    step = jax.jit(lambda x, ids, state: layer.apply(params, x, ids, state))
    apply_update = jax.jit(layer.apply_update)
    state, outputs = layer.empty_state(B, D, T), []
    for start, stop in zip((0, *cuts), (*cuts, T), strict=True):
        y, update = step(x[:, start:stop], ids[:, start:stop], state)
        state = apply_update(state, update)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1)


@every_layer
def test_a_row_in_parts_equals_the_op_for_whole_rows(layer):
    x, ones = Draw(0)(B, T, D), jnp.ones((B, T), jnp.int32)
    params, run = _params(layer, x), jax.jit(layer.apply)
    whole, update = run(params, x)
    assert update is None
    np.testing.assert_array_equal(run(params, x, ones)[0], whole)
    assert_matches(_in_parts(layer, params, x, ones, (5, 6, 7)), whole, dtype="float32", scale=4)


@every_layer
def test_packed_documents_are_read_as_if_each_stood_alone(layer):
    """At once and in parts, whatever padding holds, with documents that begin anywhere in a block of the row."""
    x = Draw(2)(B, T, D)
    params, run = _params(layer, x), jax.jit(layer.apply)
    alone = np.zeros((B, T, D), np.float32)
    for row, segment in [(0, 4), (0, 2), (1, 1), (1, 7), (1, 3)]:
        span = np.flatnonzero(DOCUMENTS[row] == segment)
        # Padded behind, so that one program serves all lengths.
        begun, ids = jnp.roll(x, -span[0], axis=1), np.tile(np.arange(T) < len(span), (B, 1)).astype(np.int32)
        alone[row, span] = run(params, begun, ids)[0][row, : len(span)]
    is_real = np.asarray(DOCUMENTS != 0)
    x = jnp.where((DOCUMENTS == 0)[..., None], 1e4, x)
    packed = run(params, x, DOCUMENTS)[0]
    parts = _in_parts(layer, params, x, DOCUMENTS, (3, 11, 12))
    for y in (packed, parts):
        assert_matches(y[is_real], alone[is_real], dtype="float32", scale=4)


@every_layer
def test_packed_rows_have_the_gradient_of_their_documents(layer):
    x = Draw(3)(1, 12, D)
    params = _params(layer, x)
    ids = jnp.repeat(jnp.array([[1, 2]]), jnp.array([5, 7]), axis=1)

    @jax.jit
    def gradients(params):
        def packed(params):
            return jnp.sum(layer.apply(params, x, ids)[0] ** 2)

        def apart(params):
            return sum(jnp.sum(layer.apply(params, part)[0] ** 2) for part in (x[:, :5], x[:, 5:]))

        return jax.grad(packed)(params), jax.grad(apart)(params)

    assert_matches(*gradients(params), dtype="float32", scale=8)


def test_a_choice_from_whole_rows_alone_is_refused_a_cache():
    layer = SparseAttention(num_heads=2, num_key_heads=2, attend=document_attention)
    x = jnp.zeros((1, 2, 4))
    with pytest.raises(NotImplementedError, match="give attend_in_segments to decode"):
        jax.eval_shape(lambda: layer.init(jax.random.key(0), x, None, layer.empty_state(1, 4, 2)))
