"""The doors of a stack: per-layer inputs, a shared pytree, sown q, k and v, and compression of all layers."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet import layout
from hnet.stack import Stack
from hnet.stack_config import CacheConfig
from hnet.stack_state import apply_updates, compress, empty_state, keep_scores
from layers import Mixer
from tests.support.assertions import assert_matches
from tests.support.inputs import Draw
from tests.support.models import make_stack

B, T, D = 2, 6, 8
SIZES = dict(
    width=D, num_heads=4, num_key_heads=2, rotary_width=2, feed_forward_width=8, state_size=4, head_width=8)
CONFIG = make_stack(**SIZES)
ONES = jnp.ones((B, T), jnp.int32)


class Probe(Mixer):
    """Adds this layer's input, and appends it to the digits that come from below."""

    doors = frozenset({"layer_input", "shared"})

    @nn.compact
    def __call__(self, x, segment_ids=None, state=None, *, layer_input, shared):
        scale = self.param("scale", nn.initializers.ones, ())
        digit = 0.0 if layer_input is None else layer_input["digit"]
        return scale * x + digit, None, {"digits": 10 * shared["digits"] + digit}


@pytest.fixture
def probe(monkeypatch):
    registered = layout.RegisteredMixer("a probe", lambda stack, out_init_std, dtype, name: Probe(name=name))
    monkeypatch.setitem(layout._MIXERS, "probe", registered)


def _stack(name, config=CONFIG):
    stack, x = Stack(name, config, 0.02, jnp.float32), Draw(0)(B, T, D)
    shared = {"digits": jnp.float32(0)} if "robe" in name else None
    params = nn.unbox(jax.jit(stack.init)(jax.random.key(0), x, ONES, shared=shared))
    return stack, params, x


def test_layers_get_their_inputs_and_hand_a_pytree_upwards(probe):
    stack, params, x = _stack("probe2t1Probe1")
    inputs = ({"digit": jnp.array([1.0, 2.0])}, None, {"digit": jnp.array([3.0])})
    output = jax.jit(lambda inputs: stack.apply(
        params, x, ONES, layer_inputs=inputs, shared={"digits": jnp.float32(7)}))(inputs)
    assert float(output.shared["digits"]) == 7123
    none = stack.apply(params, x, ONES, shared={"digits": jnp.float32(7)})
    assert float(none.shared["digits"]) == 7000 and output.update is None
    assert not np.allclose(none.y, output.y)
    with pytest.raises(ValueError, match="layer_inputs has 1 entries; the 3 runs of layout 'probe2t1Probe1' need"):
        stack.apply(params, x, ONES, layer_inputs=(None,), shared={"digits": jnp.float32(0)})


@pytest.mark.parametrize("remat", ["none", "block"])
def test_attention_sows_q_k_and_v_of_every_layer_where_somebody_asks(remat):
    stack, params, x = _stack("t2T1", make_stack(**SIZES, remat=remat))
    assert list(params) == ["params"]
    y = stack.apply(params, x, ONES).y
    output, sown = stack.apply(params, x, ONES, mutable=["intermediates"])
    np.testing.assert_allclose(output.y, y, atol=1e-6)
    for run, count in (("run0", 2), ("run1", 1)):
        q, k, v = (sown["intermediates"][run]["mixer"][name][0] for name in ("queries", "keys", "values"))
        assert q.shape == (count, B, T, 4, 2) and k.shape == v.shape == (count, B, T, 2, 2)
    # The first layer's values are the projection of the normed input.
    kernel = params["params"]["run0"]["mixer"]["kv"]["kernel"][0, :, 1]
    normed = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-5)
    v = sown["intermediates"]["run0"]["mixer"]["values"][0][0]
    np.testing.assert_allclose(v, np.einsum("btd,dnk->btnk", normed, kernel), atol=1e-5)


def test_all_layers_are_compressed_in_one_call_with_budgets_of_their_own():
    stack, params, x = _stack("m1t2T1")
    sizes = "m1t2T1", CONFIG
    state = empty_state(*sizes, B, 2 * T, jnp.float32)
    step = jax.jit(lambda x, state: stack.apply(params, x, ONES[:, : x.shape[1]], state))
    state = apply_updates(*sizes, jnp.float32, state, step(x, state).update)
    scores = keep_scores(*sizes, jnp.float32, state)
    assert scores[0] is None and scores[1].shape == (2, B, 1, 2 * T)

    budget_of = lambda run: np.asarray(jnp.sum(run.positions >= 0, axis=-1))  # noqa: E731
    shrink = jax.jit(lambda state, budgets: compress(*sizes, jnp.float32, state, budgets))
    small = shrink(state, (None, jnp.array([1, 4]), jnp.array([[[3], [5]]])))
    np.testing.assert_array_equal(budget_of(small.runs[1])[:, :, 0], [[1, 1], [4, 4]])
    np.testing.assert_array_equal(budget_of(small.runs[2])[:, :, 0], [[3, 5]])
    jax.tree.map(np.testing.assert_array_equal, small.runs[0], state.runs[0])
    assert np.isfinite(step(x[:, :1], small).y).all()


def test_attention_decodes_with_the_policy_of_its_config():
    cache = CacheConfig(policy="sink_recent", budget=4, num_sinks=1)
    config = make_stack(width=D, num_heads=2, rotary_width=2, cache=cache)
    stack, params, x = _stack("t1", config)
    state = empty_state("t1", config, B, T, jnp.float32)
    update = stack.apply(params, x, ONES, state).update
    after = apply_updates("t1", config, jnp.float32, state, update)
    assert sorted(np.asarray(after.runs[0].positions)[0, 0, 0].tolist()) == [0, 3, 4, 5]
    with pytest.raises(ValueError, match=r"attention\.cache: cache policy 'lru' is not one of full, window"):
        CacheConfig(policy="lru")
    with pytest.raises(ValueError, match=r"attention\.cache: cache budget 0 must be at least 1 slots"):
        CacheConfig(policy="window")


@pytest.mark.parametrize("layout", ["t1", "moba1", pytest.param("nsa1", marks=pytest.mark.slow)])
def test_a_cache_keeps_keys_and_values_in_a_dtype_of_its_own(layout):
    """Every token then reads rounded keys and values, whether it comes in one call with them or later."""
    config, narrow = (make_stack(width=D, num_heads=2, rotary_width=2, cache=CacheConfig(dtype=dtype))
                      for dtype in ("", "bfloat16"))
    stack, params, x = _stack(layout, config)
    params = jax.tree.map(lambda leaf: 20 * leaf, params)  # so that attention counts
    assert [empty_state(layout, each, B, T, jnp.float32).runs[0].k.dtype for each in (config, narrow)] == [
        jnp.float32, jnp.bfloat16]

    @jax.jit
    def read(x, state):
        output = stack.apply(params, x, ONES[:, : x.shape[1]], state)
        return output.y, apply_updates(layout, narrow, jnp.float32, state, output.update)

    whole, _ = read(x, empty_state(layout, narrow, B, T, jnp.float32))
    first, state = read(x[:, :3], empty_state(layout, narrow, B, T, jnp.float32))
    rest, state = read(x[:, 3:], state)
    assert state.runs[0].v.dtype == jnp.bfloat16 and rest.dtype == jnp.float32
    assert_matches(jnp.concatenate([first, rest], axis=1), whole, dtype="float32")
    exact = stack.apply(params, x, ONES).y
    assert 1e-4 < jnp.abs(whole - exact).max() < 0.02 * jnp.abs(exact).max()
    with pytest.raises(ValueError, match=r"attention\.cache\.dtype 'int8' is not one of float32, bfloat16"):
        CacheConfig(dtype="int8")
