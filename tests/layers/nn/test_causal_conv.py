import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import causal_depthwise_conv
from tests.support.inputs import Draw

conv = jax.jit(causal_depthwise_conv)
TAPS, WIDTH = 4, 5
KERNEL = Draw(1)(TAPS, WIDTH)
BIAS = Draw(2)(WIDTH)


def _by_hand(x, segment_ids):
    x, y = np.asarray(x, np.float64), np.zeros(x.shape)
    for b, t in np.ndindex(*segment_ids.shape):
        if segment_ids[b, t] == 0:
            continue
        y[b, t] = BIAS
        for back in range(TAPS):
            if t - back >= 0 and segment_ids[b, t - back] == segment_ids[b, t]:
                y[b, t] += np.asarray(KERNEL)[TAPS - 1 - back] * x[b, t - back]
    return y


def _x(t):
    return Draw(t)(2, t, WIDTH)


@pytest.mark.parametrize("t", [1, 2, 7, 33])
def test_taps_stay_within_their_segment(t):
    ids = np.ones((2, t), np.int32)
    ids[1] = np.arange(t) // 3 + 1
    ids[1, : t // 7] = ids[1, t - t // 4 :] = 0
    y, _ = conv(_x(t), KERNEL, BIAS, segment_ids=jnp.asarray(ids))
    np.testing.assert_allclose(y, _by_hand(_x(t), ids), atol=1e-5)


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_a_split_sequence_with_carried_state_equals_the_whole(cut):
    x = _x(12)
    whole, last = conv(x, KERNEL, BIAS)
    first, state = conv(x[:, :cut], KERNEL, BIAS)
    second, state = conv(x[:, cut:], KERNEL, BIAS, initial_state=state)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-6)
    np.testing.assert_array_equal(state, last)


def test_padding_ahead_does_not_come_between_the_carried_state_and_its_tokens():
    x, state = _x(12), Draw(3)(2, TAPS - 1, WIDTH)
    ids = jnp.asarray([[0] * 3 + [4] * 9, [4] * 12], jnp.int32)
    y, after = conv(x, KERNEL, BIAS, initial_state=state, segment_ids=ids)
    expected, last = conv(x[:, 3:], KERNEL, BIAS, initial_state=state)
    np.testing.assert_allclose(y[0, 3:], expected[0], atol=1e-6)
    np.testing.assert_array_equal(after[0], last[0])


def test_state_is_that_after_the_last_real_token():
    x = _x(9)
    ids = jnp.array([[3] * 6 + [0] * 3, [1] * 7 + [2] * 2])
    _, state = conv(x, KERNEL, BIAS, segment_ids=ids)
    np.testing.assert_array_equal(state[0], x[0, 3:6])
    np.testing.assert_array_equal(state[1], jnp.concatenate([jnp.zeros((1, WIDTH)), x[1, 7:]]))


def test_a_row_of_padding_leaves_the_state_alone():
    state = Draw(9)(2, TAPS - 1, WIDTH)
    y, after = conv(
        _x(5), KERNEL, BIAS, initial_state=state, segment_ids=jnp.zeros((2, 5), jnp.int32))
    assert (y == 0).all()
    np.testing.assert_array_equal(after, state)
