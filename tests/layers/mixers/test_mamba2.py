from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import Mamba2
from tests.support.assertions import GOLDEN_LAYER_LIMIT, assert_golden, golden

DATA = golden("hnet_mamba2_layer")
WIDTH, INNER = DATA["param/out_proj.weight"].shape
NUM_HEADS, HEAD_WIDTH, STATE_SIZE = DATA["ssm_state"].shape[1:]
NUM_CHANNELS, _, TAPS = DATA["param/conv1d.weight"].shape  # of x, keys and queries
MODULE = Mamba2(state_size=STATE_SIZE, head_width=HEAD_WIDTH, expand=INNER // WIDTH, conv_taps=TAPS,
                num_groups=(NUM_CHANNELS - INNER) // (2 * STATE_SIZE))
check = partial(assert_golden, limit=GOLDEN_LAYER_LIMIT)


def _params(prefix="param/"):
    """The official tensors (or their gradients) under our names."""
    official = {key.removeprefix(prefix): z for key, z in DATA.items() if key.startswith(prefix)}
    z, x, bc, dt = np.split(official["in_proj.weight"].T, np.cumsum([INNER, INNER, NUM_CHANNELS - INNER]), axis=1)
    taps, bias = official["conv1d.weight"][:, 0].T, official["conv1d.bias"]
    return {
        "z_proj": {"kernel": z}, "x_proj": {"kernel": x}, "bc_proj": {"kernel": bc}, "dt_proj": {"kernel": dt},
        "conv_x": {"kernel": taps[:, :INNER], "bias": bias[:INNER]},
        "conv_bc": {"kernel": taps[:, INNER:], "bias": bias[INNER:]},
        "dt_bias": official["dt_bias"], "a_log": official["A_log"], "skip": official["D"],
        "norm_scale": official["norm.weight"], "out": {"kernel": official["out_proj.weight"].T},
    }


@jax.jit
def _run(x, params=None, **options):
    return MODULE.apply({"params": params or _params()}, x, **options)


def _official_states(state):
    """The release keeps one more convolution input than it reads, channels first, and states [b, h, p, n]."""
    conv = np.concatenate([state.conv_x, state.conv_bc], axis=-1)
    return np.swapaxes(conv, 1, 2), np.swapaxes(state.ssm, -1, -2)


def test_values_and_gradients_match_the_official_layer():
    x, grad_y = jnp.asarray(DATA["x"]), DATA["grad_y"]
    check(_run(x)[0], DATA["y"])
    loss = lambda params, x: jnp.sum(_run(x, params)[0] * grad_y)  # noqa: E731
    gradient, grad_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(_params(), x)
    check(grad_x, DATA["grad_x"])
    check(gradient, _params("grad/"))


def test_packed_segments_reset_convolution_and_state():
    segment_ids = jnp.asarray(DATA["seq_idx"] + 1)
    loss = lambda x: jnp.sum(_run(x, segment_ids=segment_ids)[0] * DATA["grad_y"])  # noqa: E731
    x = jnp.asarray(DATA["x"])
    check(_run(x, segment_ids=segment_ids)[0], DATA["y_seq_idx"])
    check(jax.jit(jax.grad(loss))(x), DATA["grad_x_seq_idx"])


def test_prefill_then_single_steps_match_the_official_decoding():
    x, length = jnp.asarray(DATA["x"]), int(DATA["prefill_len"])
    y, state = _run(x[:, :length])
    check(y, DATA["y_prefill"])
    conv, ssm = _official_states(state)
    check((conv, ssm), (DATA["conv_state"][..., 1:], DATA["ssm_state"]))
    for step in range(DATA["y_step"].shape[1]):
        token = x[:, length + step : length + step + 1]
        y, state = _run(token, state=state)
        check(y[:, 0], DATA["y_step"][:, step])
    conv, ssm = _official_states(state)
    check((conv, ssm), (DATA["conv_state_end"][..., 1:], DATA["ssm_state_end"]))


def test_bfloat16_layer_keeps_its_state_in_float32():
    module = MODULE.clone(dtype=jnp.bfloat16)
    y, state = jax.jit(module.apply)({"params": _params()}, jnp.asarray(DATA["x"], jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and state.ssm.dtype == jnp.float32
    check(y, DATA["y"], limit=0.03)


def test_time_constants_start_in_their_official_ranges():
    module = Mamba2(state_size=8, head_width=4)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4, 256)))["params"]
    dt = jax.nn.softplus(params["dt_bias"].value)
    assert dt.shape == (128,) and 1e-3 <= dt.min() and dt.max() <= 0.1
    rate = jnp.exp(params["a_log"].value)
    assert 1 <= rate.min() and rate.max() <= 16


def test_refuses_a_head_width_that_does_not_divide():
    with pytest.raises(ValueError, match="not a multiple of head_width 48"):
        Mamba2(head_width=48).init(jax.random.key(0), jnp.zeros((1, 4, 64)))
