"""Attention as a layer: packed rows, and a cache against the whole sequence."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import Attention, KeepAll
from tests.support.inputs import Draw


def test_module_restarts_positions_with_every_segment():
    module = Attention(num_heads=2, rotary_width=8)
    x = Draw(1)(1, 12, 32)
    ids = jnp.array([[1] * 5 + [2] * 7])
    params = jax.jit(module.init)(jax.random.key(0), x)
    run = jax.jit(module.apply)
    packed, _ = run(params, x, ids)
    apart = [run(params, x[:, :5])[0], run(params, x[:, 5:])[0]]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), atol=1e-6)


def test_padding_may_hold_anything():
    module = Attention(num_heads=2, rotary_width=8)
    x, ids = Draw(1)(1, 7, 32), jnp.array([[0, 3, 3, 3, 0, 0, 4]])
    params = jax.jit(module.init)(jax.random.key(0), x)
    poisoned = jnp.where((ids != 0)[..., None], x, jnp.nan)

    def total(params, x):
        return jnp.sum(jnp.where((ids != 0)[..., None], module.apply(params, x, ids)[0], 0) ** 2)

    run = jax.jit(jax.value_and_grad(total))
    jax.tree.map(np.testing.assert_array_equal, run(params, poisoned), run(params, x))
    cache = module.empty_state(1, 32, 7)
    read = jax.jit(module.apply)
    np.testing.assert_array_equal(read(params, poisoned, ids, cache)[0], read(params, x, ids, cache)[0])


@pytest.mark.parametrize(("window", "policy"), [(None, None), (3, KeepAll()), (3, None)])
def test_a_cache_gives_what_the_whole_sequence_gives_for_ragged_rows(window, policy):
    """Pieces of any length, padded on either side, a row that sits a piece out, and slots for a window alone."""
    module = Attention(num_heads=2, rotary_width=8, window=window, policy=policy)
    x = Draw(2)(3, 12, 32)
    params = jax.jit(module.init)(jax.random.key(0), x)
    run = jax.jit(module.apply)
    whole, _ = run(params, x)
    cache = module.empty_state(3, 32, 12)
    num_read = np.zeros(3, int)
    for counts, side in (((4, 1, 0), "right"), ((2, 5, 3), "left"), ((6, 6, 6), "right"), ((0, 0, 3), "right")):
        piece, ids = np.zeros((3, 6, 32), np.float32), np.zeros((3, 6), np.int32)
        spans = [slice(0, n) if side == "right" else slice(6 - n, 6) for n in counts]
        for row, (n, span) in enumerate(zip(counts, spans, strict=True)):
            piece[row, span], ids[row, span] = x[row, num_read[row] : num_read[row] + n], 1
        y, update = run(params, jnp.asarray(piece), jnp.asarray(ids), cache)
        cache = module.apply_update(cache, update)
        for row, (n, span) in enumerate(zip(counts, spans, strict=True)):
            np.testing.assert_allclose(y[row, span], whole[row, num_read[row] : num_read[row] + n], atol=1e-6)
        num_read += counts
    np.testing.assert_array_equal(cache.num_read, num_read)


def test_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="width 32 is not a multiple of num_heads 5"):
        Attention(num_heads=5, rotary_width=0).init(jax.random.key(0), jnp.zeros((1, 4, 32)))
