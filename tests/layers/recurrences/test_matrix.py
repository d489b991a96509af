"""Matrix recurrences against their spec: any length, segments, kernels, reversal, and what they refuse."""
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from layers import diagonal_recurrence, gated_delta_rule, gated_linear_attention
from layers.recurrences.matrix.triangular import unit_lower_inverse
from tests.support.assertions import assert_golden, assert_matches
from tests.support.recurrence_cases import B, H, K, matrix_inputs, run_delta, run_linear_attention, run_rwkv7


@pytest.mark.parametrize(("length", "kind", "dtype"), [
    (1, "head", "float32"), (7, "channel", "float32"), (63, "head", "float32"), (64, "channel", "float32"),
    (65, "head", "float32"), (65, "channel", "float32"), (150, "none", "float32"), (150, "channel", "float32"),
    (65, "head", "bfloat16"), (150, "channel", "bfloat16")])
def test_chunkwise_matches_reference_with_segments(length, kind, dtype):
    x = matrix_inputs(length, kind, dtype)
    ids = np.repeat([[1, 1, 2, 0, 3, 3, 4], [0, 5, 5, 5, 6, 7, 7]], -(-length // 7), axis=1)[:, :length]
    ids = jnp.asarray(ids, jnp.int32)
    exact = jax.tree.map(lambda z: z.astype(jnp.float32), x)

    @partial(jax.jit, static_argnums=1)
    def run(x, implementation):
        def both(x):
            keywords = dict(initial_state=x["h0"], segment_ids=ids, implementation=implementation)
            return run_linear_attention(x, **keywords), run_delta(x, **keywords)

        results, pull_back = jax.vjp(both, x)
        return results, pull_back(jax.tree.map(jnp.ones_like, results))[0]

    expected, expected_gradients = run(exact, "reference")
    results, gradients = run(x, "chunkwise")
    assert_matches(results, expected, dtype=dtype, scale=2)
    assert_matches(gradients, expected_gradients, dtype=dtype, scale=8 if dtype == "float32" else 2)
    assert all(not np.asarray(o)[np.asarray(ids) == 0].any() for o, _ in results)


# Rules, decays, lengths and a state per row or per segment, each at least once.
@pytest.mark.parametrize(("implementation", "recur", "kind", "length", "dtype", "is_state_of_segment"), [
    ("pallas_tpu", run_delta, "channel", 65, "bfloat16", False),
    ("pallas_tpu", run_linear_attention, "head", 7, "float32", True),
    ("pallas_gpu", run_linear_attention, "head", 65, "bfloat16", False),
    ("pallas_gpu", run_delta, "head", 7, "float32", True),
    ("pallas_gpu", run_rwkv7, "channel", 20, "float32", False)])
def test_kernels_match_reference_with_segments(
        implementation, recur, kind, length, dtype, is_state_of_segment):
    x = matrix_inputs(length, kind, dtype)
    if recur is run_rwkv7:
        x |= dict(r=x["q"], w=x["g"], a=-x["k"], b=x["k"] * x["beta"][..., None])
    if is_state_of_segment:
        x["h0"] = jnp.stack([x["h0"], 2 * x["h0"], -x["h0"]], axis=1)
    row = [1, 1, 2, 0, 3, 3, 3] if is_state_of_segment else [1, 1, 2, 0, 3, 4, 4]
    ids = jnp.asarray(np.repeat([row, row[::-1]], -(-length // 7), axis=1)[:, :length], jnp.int32)

    @partial(jax.jit, static_argnums=1)
    def run(x, implementation):
        def recur_all(x):
            return recur(x, initial_state=x["h0"], segment_ids=ids, implementation=implementation, interpret=True)

        results, pull_back = jax.vjp(recur_all, x)
        return results, pull_back(jax.tree.map(jnp.ones_like, results))[0]

    expected, expected_gradients = run(jax.tree.map(lambda z: z.astype(jnp.float32), x), "reference")
    results, gradients = run(x, implementation)
    assert_matches(results, expected, dtype=dtype)
    assert_matches(gradients, expected_gradients, dtype=dtype, scale=2)
    assert not np.asarray(results[0])[np.asarray(ids) == 0].any()


@pytest.mark.parametrize("implementation", ["reference", "chunkwise"])
@pytest.mark.parametrize("split", [1, 17, 64])
def test_a_sequence_split_anywhere_equals_the_whole(split, implementation):
    x = matrix_inputs(80, "channel")
    run = jax.jit(lambda x, h0: run_delta(x, initial_state=h0, implementation=implementation))
    whole, last = run(x, x["h0"])
    first, state = run({name: z[:, :split] for name, z in x.items() if name != "h0"}, x["h0"])
    second, end = run({name: z[:, split:] for name, z in x.items() if name != "h0"}, state)
    assert_matches((jnp.concatenate([first, second], axis=1), end), (whole, last), dtype="float32", scale=4)


def test_kernels_of_a_matrix_state_refuse_what_they_lack_and_auto_runs_it_by_chunks():
    x = {name: z.astype(jnp.float16) for name, z in matrix_inputs(20, "head").items()}
    with pytest.raises(NotImplementedError, match="q is float16; float32 and bfloat16 fit"):
        run_linear_attention(x, implementation="pallas_tpu", interpret=True)

    def num_kernels(x):
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(run_linear_attention(x)[0])))
        return gradient.trace(x).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")

    assert num_kernels(x) == 0
    x = {name: z.astype(jnp.bfloat16) for name, z in x.items()}
    assert num_kernels(x) > 0
    with jax.set_mesh(jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))):
        assert num_kernels(x) == 0, "the compiler cannot split one"


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_reverse_is_the_sequence_reversed(kind):
    x = matrix_inputs(40, kind)
    ids = jnp.asarray(np.repeat([[1, 2, 3, 0], [4, 4, 5, 5]], 10, axis=1), jnp.int32)
    flipped = {name: z if name == "h0" else jnp.flip(z, axis=1) for name, z in x.items()}
    o, last = run_delta(x, initial_state=x["h0"], segment_ids=ids, reverse=True)
    expected, expected_last = run_delta(flipped, initial_state=x["h0"], segment_ids=jnp.flip(ids, axis=1))
    assert_matches((o, last), (jnp.flip(expected, axis=1), expected_last), dtype="float32", scale=2)


@pytest.mark.parametrize("length", [1, 2, 16, 23, 64])
def test_the_inverse_of_a_triangle_of_similar_keys_is_exact_and_so_is_its_gradient(length):
    rng = np.random.default_rng(0)
    keys = rng.standard_normal(16) + 0.3 * rng.standard_normal((length, 16))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    a = np.tril(1.9 * keys @ keys.T, -1)
    exact = np.linalg.inv(np.eye(length) + a)
    inverse, pull_back = jax.vjp(unit_lower_inverse, jnp.asarray(a, jnp.float32))
    assert_golden(inverse, exact, limit=5e-6)
    gradient = rng.standard_normal((length, length))
    expected = -np.tril(exact.T @ gradient @ exact.T, -1)
    assert_golden(pull_back(jnp.asarray(gradient, jnp.float32))[0], expected, limit=2e-5, floor=1e-6)


def test_what_does_not_fit_is_refused():
    x = matrix_inputs(7, "head")
    with pytest.raises(ValueError, match="q has 3 heads, which must divide the 2 of v; arrays are time first"):
        gated_linear_attention(jnp.ones((B, 7, 3, K)), jnp.ones((B, 7, 3, K)), x["v"])
    with pytest.raises(ValueError, match="beta stands for erase and write both"):
        gated_delta_rule(x["q"], x["k"], x["v"], x["beta"], erase=x["k"])
    with pytest.raises(ValueError, match="exactly one of a and log_a"):
        diagonal_recurrence(jnp.ones((1, 2, 3)))
    with pytest.raises(Exception, match="log_decay"):
        gated_linear_attention(x["q"], x["k"], x["v"], jnp.ones((B, H, 7)))
    with pytest.raises(ValueError, match="chunk_size 0 must be at least 1"):
        gated_linear_attention(x["q"], x["k"], x["v"], chunk_size=0)


def test_what_looks_like_heads_before_time_is_said_once(caplog):
    heads_first = jnp.ones((1, 2, 300, 3))
    jax.eval_shape(gated_linear_attention, heads_first, heads_first, heads_first)
    assert "v has 300 heads of 2 tokens: arrays are time first" in caplog.text
    caplog.clear()
    jax.eval_shape(gated_linear_attention, heads_first, heads_first, heads_first)
    time_first = jnp.swapaxes(heads_first, 1, 2)
    jax.eval_shape(gated_linear_attention, time_first, time_first, time_first)
    assert not caplog.records


def test_a_positive_log_decay_is_refused_where_nans_are_looked_for():
    x = matrix_inputs(7, "head")
    refused = pytest.raises(ValueError, match=r"as large as 0\.5; it is the natural log of a decay")
    with jax.debug_nans(True), refused:
        jax.block_until_ready(diagonal_recurrence(x["g"], log_a=x["g"].at[1, 3].set(0.5)))
    with jax.debug_nans(True), refused:
        jax.block_until_ready(gated_linear_attention(x["q"], x["k"], x["v"], x["g"].at[0, 3, 1].set(0.5)))


def test_auto_steps_through_tokens_on_a_cpu_and_through_chunks_where_it_is_differentiated():
    x = matrix_inputs(70, "head")

    def run(x, implementation):
        return run_delta(x, initial_state=x["h0"], implementation=implementation)[0]

    auto = partial(run, implementation="auto")
    gradient = jax.grad(lambda x: jnp.sum(auto(x) ** 2))
    np.testing.assert_array_equal(jax.jit(auto)(x), jax.jit(partial(run, implementation="reference"))(x))
    expected = jax.grad(lambda x: jnp.sum(run(x, "reference") ** 2))(x)
    assert_matches(jax.jit(gradient)(x), expected, dtype="float32", scale=8)
    lengths = _lengths_of_scans(jax.make_jaxpr(gradient)(x).jaxpr)
    assert lengths and all(length == 3 for length in lengths), lengths


def test_bfloat16_tokens_are_multiplied_by_default_and_decays_and_the_triangle_in_float32():
    def num_exact(dtype, recur):
        x = matrix_inputs(32, "head", dtype)
        text = str(jax.make_jaxpr(lambda x: recur(x, implementation="chunkwise"))(x))
        return text.count("Precision.HIGHEST, Precision.HIGHEST"), text.count("dot_general[")

    assert num_exact("float32", run_linear_attention) == (5, 5)
    assert num_exact("bfloat16", run_linear_attention) == (1, 5), "sums of log decays"
    exact, all_of_delta = num_exact("bfloat16", lambda x, **keywords: run_delta(x | {"beta": None}, **keywords))
    assert all_of_delta - exact == 5, "what is read of the state twice, written, and what q sees of the chunk"


def _lengths_of_scans(jaxpr):
    """Outside kernels."""
    lengths = []
    for e in jaxpr.eqns:
        if e.primitive.name == "scan":
            lengths.append(e.params["length"])
        elif e.primitive.name != "pallas_call":
            for inner in jax.extend.core.jaxprs_in_params(e.params):
                lengths += _lengths_of_scans(inner)
    return lengths
