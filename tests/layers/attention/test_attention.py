import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import Attention, KeepAll, dot_product_attention
from tests.support.assertions import assert_matches
from tests.support.inputs import Draw

IMPLEMENTATIONS = ["reference", "xla"]


def _inputs(t, dtype="float32", b=2, h=3, k=16):
    draw = Draw(seed=t)
    q, k_, v, dy = (draw(b, t, h, k, dtype=dtype) for _ in range(4))
    return (q, k_, v), dy


def _segments(t):
    """Padding at both ends and in the middle, segments of lengths 1 and more."""
    ids = np.ones((2, t), np.int32)
    ids[1] = np.minimum(np.arange(t) // 3 * 2 + 1, 9)
    ids[1, : t // 8] = ids[1, t - t // 5 :] = 0
    return jnp.asarray(ids)


def _by_hand(q, k, v, segment_ids, window):
    """Row by row in float64: gather what is visible, softmax, average."""
    q, k, v = (np.asarray(z, np.float64) for z in (q, k, v))
    y = np.zeros_like(v)
    for b, i, h in np.ndindex(*q.shape[:3]):
        seen = [j for j in range(i + 1) if segment_ids[b, j] == segment_ids[b, i] != 0
                and (window < 0 or i - j <= window)]
        if seen:
            logits = k[b, seen, h] @ q[b, i, h] / np.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max())
            y[b, i, h] = weights / weights.sum() @ v[b, seen, h]
    return y


@pytest.mark.parametrize("window", [-1, 0, 3])
def test_reference_is_causal_windowed_softmax_within_segments(window):
    inputs, _ = _inputs(17)
    ids = _segments(17)
    actual = dot_product_attention(*inputs, window=window, segment_ids=ids, implementation="reference")
    assert_matches(actual, _by_hand(*inputs, np.asarray(ids), window), dtype="float32")


def _needs(implementation):
    if implementation == "tokamax":
        pytest.importorskip("tokamax")
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs an NVIDIA GPU")


@pytest.mark.parametrize(("implementation", "dtype"), [
    ("xla", "float32"), ("xla", "bfloat16"), ("tokamax", "float32"), ("tokamax", "bfloat16"),
    ("cudnn", "bfloat16")])
@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("t", [1, 7, 64])
def test_implementations_match_the_reference_in_value_and_gradient(t, window, implementation, dtype):
    _needs(implementation)
    inputs, dy = _inputs(t, dtype)
    exact, exact_dy = jax.tree.map(lambda z: z.astype(jnp.float32), (inputs, dy))

    @partial(jax.jit, static_argnums=2)
    def value_and_gradient(inputs, dy, implementation):
        run = partial(
            dot_product_attention, window=window, segment_ids=_segments(t), implementation=implementation)
        y, vjp = jax.vjp(run, *inputs)
        return y, vjp(dy)

    expected, expected_gradient = value_and_gradient(exact, exact_dy, "reference")
    actual, gradient = value_and_gradient(inputs, dy, implementation)
    assert actual.dtype == jnp.dtype(dtype)
    # bfloat16 probabilities are a second rounding; their gradients a third and fourth.
    scale = 2 if dtype == "bfloat16" else 1
    assert_matches(actual, expected, dtype=dtype, scale=scale)
    assert_matches(gradient, expected_gradient, dtype=dtype, scale=2 * scale)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_gets_zero_and_gives_finite_gradients(implementation):
    inputs, _ = _inputs(8)
    ids = jnp.zeros((2, 8), jnp.int32).at[0, 2:5].set(4)
    run = partial(dot_product_attention, segment_ids=ids, implementation=implementation)
    y, vjp = jax.vjp(run, *inputs)
    assert (np.asarray(y)[np.asarray(ids) == 0] == 0).all()
    assert all(np.isfinite(g).all() for g in vjp(jnp.ones_like(y)))


def test_module_restarts_positions_with_every_segment():
    module = Attention(num_heads=2, rotary_width=8)
    x = Draw(1)(1, 12, 32)
    ids = jnp.array([[1] * 5 + [2] * 7])
    params = jax.jit(module.init)(jax.random.key(0), x)
    run = jax.jit(module.apply)
    packed, _ = run(params, x, ids)
    apart = [run(params, x[:, :5])[0], run(params, x[:, 5:])[0]]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), atol=1e-6)


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


def test_refuses_a_wrong_shape_by_argument_name():
    (q, k, v), _ = _inputs(8)
    with pytest.raises(TypeError, match="parameter 'k'"):
        dot_product_attention(q, k[:, :-1], v)


def test_tokamax_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    (q, k, v), _ = _inputs(4)
    with pytest.raises(NotImplementedError, match='implementation="tokamax" needs that package'):
        dot_product_attention(q, k, v, implementation="tokamax")
