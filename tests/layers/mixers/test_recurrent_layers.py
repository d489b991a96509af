"""Layers with a matrix state: what their states and segments promise, and their gates against the papers."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import GLA, HGRN2, GatedDeltaNet, RWKV7TimeMix
from tests.support.carried_state import HALF, assert_state_is_carried
from tests.support.inputs import Draw

B, D = 2, 12
LAYERS = {
    "gla": GLA(state_size=4, head_width=6, decay_rank=2),
    "hgrn2": HGRN2(state_size=4, head_width=6, lower_bound=0.2),
    "gated delta net": GatedDeltaNet(state_size=4, head_width=6),
    "kda": GatedDeltaNet(state_size=4, head_width=6, decays_per_channel=True, may_negate=True),
    "rwkv7": RWKV7TimeMix(head_width=6, rank=2),
}


def _with_random_parameters(layer, x):
    """Parameters far from the start, where some are zero and states hardly matter."""
    shapes = nn.unbox(jax.eval_shape(lambda: layer.init(jax.random.key(0), x)))
    draw = Draw(1)
    return jax.tree.map(lambda leaf: 0.5 * draw(*leaf.shape), shapes)


@pytest.mark.parametrize("name", LAYERS)
def test_a_sequence_may_be_split_anywhere_and_segments_are_apart(name):
    layer = LAYERS[name]
    x = Draw(0)(B, 2 * HALF, D)
    variables = _with_random_parameters(layer, x)
    empty = layer.empty_state(B, D)
    assert_state_is_carried(lambda x, ids, state: layer.apply(variables, x, ids, state), x, empty)
    y, state = layer.apply(variables, x)
    np.testing.assert_array_equal(y, layer.apply(variables, x, None, empty)[0])  # None means empty
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)


def test_decays_of_gated_delta_net_are_those_of_mamba_2_and_keys_have_norm_1():
    """The layer, written out for one head and one token, from the paper's equations."""
    layer = GatedDeltaNet(state_size=3, head_width=4, conv_taps=1)
    x = Draw(2)(1, 1, 4)
    variables = _with_random_parameters(layer, x)
    p = jax.tree.map(np.asarray, variables["params"])
    memory = np.asarray(Draw(3)(1, 1, 3, 4))
    y, state = layer.apply(variables, x, None, layer.empty_state(1, 4)._replace(memory=jnp.asarray(memory)))

    token = np.asarray(x)[0, 0]
    sigmoid, silu = lambda z: 1 / (1 + np.exp(-z)), lambda z: z / (1 + np.exp(-z))

    def convolved(name):
        return silu(token @ p[name]["proj"]["kernel"] * p[name]["conv"]["kernel"][0] + p[name]["conv"]["bias"])

    q, k, v = convolved("q"), convolved("k"), convolved("v")
    q, k = q / np.linalg.norm(q), k / np.linalg.norm(k)
    decay = np.exp(-np.exp(p["a_log"]) * np.log1p(np.exp(token @ p["decay_proj"]["kernel"] + p["dt_bias"])))
    beta = sigmoid(token @ p["beta_proj"]["kernel"])
    expected = decay * memory[0, 0]
    expected = expected + np.outer(k, beta * (v - expected.T @ k))
    np.testing.assert_allclose(state.memory[0, 0], expected, rtol=1e-5, atol=1e-6)
    o = expected.T @ q / np.sqrt(3)
    o = o / np.sqrt(np.mean(o**2) + 1e-5) * p["output"]["norm_scale"]
    o = o * silu(np.einsum("d,dhv->v", token, p["gate_proj"]["kernel"]))
    np.testing.assert_allclose(y[0, 0], o @ p["output"]["out"]["kernel"][0], rtol=1e-4, atol=1e-5)


def test_a_time_mix_is_that_of_the_rwkv_7_paper():
    """Two tokens of one head, written out from the paper's equations."""
    layer = RWKV7TimeMix(head_width=3, rank=2)
    x = Draw(4)(1, 2, 3)
    variables = _with_random_parameters(layer, x)
    p = jax.tree.map(np.asarray, variables["params"])
    y, _ = layer.apply(variables, x)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    memory, before = np.zeros((3, 3)), np.zeros(3)  # S^T of the paper
    for t, token in enumerate(np.asarray(x)[0]):
        def mixed(name, token=token, before=before):
            return token + (before - token) * p[f"{name}_shift"]

        def low_rank(name, between, mixed=mixed):
            return between(mixed(name) @ p[name]["down"]["kernel"]) @ p[name]["up"]["kernel"][:, 0]

        r, k, v = (mixed(name) @ p[name]["kernel"][:, 0] for name in ("receptance", "key", "value"))
        decay = np.exp(-np.exp(-0.5) * sigmoid(p["decay_bias"][0] + low_rank("decay", np.tanh)))
        rate = sigmoid(p["rate_bias"][0] + low_rank("rate", lambda z: z))
        removed = k * p["removal_key"][0]
        removed = removed / np.linalg.norm(removed)
        k = k * (1 + (rate - 1) * p["key_rate"][0])
        memory = (np.diag(decay) - np.outer(removed * rate, removed)) @ memory + np.outer(k, v)
        o = memory.T @ r
        o = (o - o.mean()) / np.sqrt(o.var() + 64e-5) * p["norm_scale"][0] + p["norm_bias"][0]
        o = (o + r @ (p["bonus"][0] * k) * v) * low_rank("gate", sigmoid)
        np.testing.assert_allclose(y[0, t], o @ p["out"]["kernel"][0], rtol=1e-4, atol=1e-5)
        before = token


def test_a_width_that_heads_do_not_fill_is_refused():
    with pytest.raises(ValueError, match=r"expand \* width = 12 is not a multiple of head_width 5"):
        GLA(head_width=5).init(jax.random.key(0), jnp.ones((1, 2, D)))
    with pytest.raises(ValueError, match=r"lower_bound 1\.0 must be from 0 to below 1"):
        HGRN2(lower_bound=1.0).init(jax.random.key(0), jnp.ones((1, 2, D)))
