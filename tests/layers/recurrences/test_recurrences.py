"""Every recurrence against the official vectors and its spec: outputs, states, gradients; hostile gates too."""
import itertools
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from layers import (
    diagonal_recurrence,
    dplr_recurrence,
    gated_delta_product,
    gated_delta_rule,
    gated_linear_attention,
    rwkv6_recurrence,
)
from layers.recurrences.diagonal import pallas_gpu
from layers.recurrences.matrix.triangular import unit_lower_inverse
from tests.support.assertions import assert_golden, assert_matches, golden
from tests.support.inputs import Draw


def _linear_attention(x, **keywords):
    return gated_linear_attention(x["q"], x["k"], x["v"], x.get("g"), **keywords)


def _hgrn2(x, **keywords):
    return gated_linear_attention(x["q"], 1 - jnp.exp(x["g"]), x["v"], x["g"], **keywords)


def _ssd(x, **keywords):
    return gated_linear_attention(x["C"], x["B"], x["X"], x["A"], scale=1.0, **keywords)


def _rwkv6(x, **keywords):
    return rwkv6_recurrence(x["q"], x["k"], x["v"], x["g"], x["u"], **keywords)


def _delta(x, **keywords):
    return gated_delta_rule(x["q"], x["k"], x["v"], x.get("beta"), x.get("g"), read_key=x.get("p"),
                            erase=x.get("b"), write=x.get("w"), **keywords)


def _delta_product(x, **keywords):
    k, v, beta = (z.reshape(z.shape[0], -1, 2, *z.shape[2:]) for z in (x["k"], x["v"], x["beta"]))
    return gated_delta_product(x["q"], k, v, beta, x["g"], scale=1.0, **keywords)


def _rwkv7(x, **keywords):
    return dplr_recurrence(x["r"], x["w"], x["k"], x["v"], x["a"], x["b"], **keywords)


RECURRENCES = {  # the vectors of each, and how its inputs are called there
    "rec_simple_gla": (_linear_attention, "q k v g"),
    "rec_ssd": (_ssd, "C B X A"),
    "rec_gla": (_linear_attention, "q k v g"),
    "rec_hgrn2": (_hgrn2, "q v g"),
    "rec_rwkv6": (_rwkv6, "q k v g u"),
    "rec_deltanet": (_delta, "q k v beta"),
    "rec_gated_deltanet": (_delta, "q k v beta g"),
    "rec_kda": (_delta, "q k v beta g"),
    "rec_comba": (_delta, "q k v beta g p"),
    "rec_gdn2": (_delta, "q k v g b w"),
    "rec_gated_delta_product": (_delta_product, "q k v beta g"),
    "rec_rwkv7": (_rwkv7, "r w k v a b"),
}


@pytest.mark.parametrize("implementation", ["reference", "chunkwise"])
@pytest.mark.parametrize("name", RECURRENCES)
def test_outputs_states_and_gradients_are_those_of_the_official_vectors(name, implementation):
    data = golden(name)
    recur, names = RECURRENCES[name]
    cases = sorted({key.split(".")[0] for key in data if "." in key})
    assert len(cases) >= 2, "mild and hostile gates"
    for case in cases:
        of_case = {key.split(".")[1]: value for key, value in data.items() if key.startswith(f"{case}.")}
        segments = of_case.get("segment_ids")
        inputs = {key: jnp.asarray(of_case[key], jnp.float32) for key in [*names.split(), "h0"] if key in of_case}
        if segments is not None:
            inputs["h0"] = inputs["h0"][None]  # one per segment of the only row

        @jax.jit
        def run(inputs, do, d_state, segments=segments):
            ids = None if segments is None else jnp.asarray(segments)

            def of_inputs(x):
                return recur(x, initial_state=x.get("h0"), segment_ids=ids, implementation=implementation)

            (o, state), pull_back = jax.vjp(of_inputs, inputs)
            return o, state, pull_back((do, jnp.broadcast_to(d_state, state.shape)))[0]

        o, state, gradients = run(
            inputs, jnp.asarray(of_case["do"], jnp.float32), jnp.asarray(of_case.get("dht", 0.0), jnp.float32))
        if segments is not None:
            gradients["h0"], state = gradients["h0"][0], state[0]
        assert_golden(o, of_case["o"])
        if "ht" in of_case:
            assert_golden(state, of_case["ht"])
        expected = {key: of_case[f"grad_{key}"] for key in gradients if f"grad_{key}" in of_case}
        assert expected, case
        assert_golden({key: gradients[key] for key in expected}, expected)


DIAGONAL_CASES = {"c0": {}, "c1": dict(reverse=True), "c2": {}, "c3": {}, "c4": {}}
DIAGONAL_KERNELS = ("pallas_tpu", "pallas_gpu")


@pytest.fixture
def few_rows_at_once(monkeypatch):
    """The kernel for GPUs unrolls what it does to the rows that it reads ahead, which takes long to compile."""
    monkeypatch.setattr(pallas_gpu, "AHEAD", 64)


@pytest.mark.parametrize(("case", "implementation"), [
    *itertools.product(DIAGONAL_CASES, ("reference", "associative")),
    *itertools.product(("c1", "c3"), DIAGONAL_KERNELS)])
def test_a_diagonal_state_is_that_of_the_official_vectors(case, implementation, few_rows_at_once):
    data = {key.split(".")[1]: value for key, value in golden("rec_diag").items() if key.startswith(f"{case}.")}
    if "x_re" in data:
        for name in ("x", "a", "y", "dy", "ht", "dht"):
            if f"{name}_re" in data:
                data[name] = data[f"{name}_re"] + 1j * data[f"{name}_im"]
    dtype = jnp.complex64 if case == "c3" else jnp.float32
    x, a, dy = (jnp.asarray(data[name], dtype) for name in ("x", "a", "dy"))
    initial = jnp.asarray(data["h0"], dtype) if "h0" in data else None

    @jax.jit
    def run(x, a):
        return diagonal_recurrence(x, a=a, initial_state=initial, implementation=implementation, interpret=True,
                                   **DIAGONAL_CASES[case])

    (y, last), pull_back = jax.vjp(run, x, a)
    assert_golden(jnp.real(y), np.real(data["y"]))
    if case == "c3":
        assert_golden(jnp.imag(y), np.imag(data["y"]))
        dx, da = pull_back((jnp.conj(dy), jnp.zeros_like(last)))
        for name, gradient in {"x": dx, "a": da}.items():  # jax's are the conjugates
            assert_golden(jnp.real(gradient), data[f"grad_{name}_re"])
            assert_golden(-jnp.imag(gradient), data[f"grad_{name}_im"])
        return
    assert_golden(last, data["ht"])
    dx, da = pull_back((dy, jnp.asarray(data["dht"], dtype)))
    assert_golden((dx, da), (data["grad_x"], data["grad_a"]))


@pytest.mark.parametrize("implementation", ["reference", "associative", *DIAGONAL_KERNELS])
def test_a_state_per_segment_is_that_of_the_official_vectors(implementation, few_rows_at_once):
    data = golden("rec_hgrn")
    for case in ("c2",) if implementation in DIAGONAL_KERNELS else ("c0", "c1", "c2"):
        of_case = {key.split(".")[1]: value for key, value in data.items() if key.startswith(f"{case}.")}
        segments = of_case.get("segment_ids")
        x, g = (jnp.asarray(of_case[name], jnp.float32) for name in ("x", "g"))
        h0 = jnp.asarray(of_case["h0"], jnp.float32) if "h0" in of_case else None
        if segments is not None:
            h0, segments = h0[None], jnp.asarray(segments)
        (y, last), pull_back = jax.vjp(
            jax.jit(lambda x, g, h0=h0, segments=segments: diagonal_recurrence(
                x, log_a=g, initial_state=h0, segment_ids=segments, implementation=implementation,
                interpret=True)), x, g)
        gradients = pull_back((jnp.asarray(of_case["do"], jnp.float32),
                               jnp.asarray(of_case["dht"], jnp.float32).reshape(last.shape)))
        assert_golden((y, last.reshape(of_case["ht"].shape)), (of_case["o"], of_case["ht"]))
        assert_golden(gradients, (of_case["grad_x"], of_case["grad_g"]))


B, H, K, V = 2, 2, 8, 12


def _inputs(length, kind, dtype="float32"):
    draw = Draw(length)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    decay = {"none": None, "head": -jnp.abs(draw(B, length, H)),
             "channel": -20 * draw.uniform(B, length, H, K) ** 8}[kind]
    x = {"q": draw(B, length, H, K), "k": unit(draw(B, length, H, K)), "v": draw(B, length, H, V),
         "beta": 2 * draw.uniform(B, length, H)}
    x = {name: value.astype(dtype) for name, value in x.items()}
    return x | ({} if decay is None else {"g": decay}) | {"h0": draw(B, H, K, V)}


@pytest.mark.parametrize(("length", "kind", "dtype"), [
    (1, "head", "float32"), (7, "channel", "float32"), (63, "head", "float32"), (64, "channel", "float32"),
    (65, "head", "float32"), (65, "channel", "float32"), (150, "none", "float32"), (150, "channel", "float32"),
    (65, "head", "bfloat16"), (150, "channel", "bfloat16")])
def test_chunkwise_matches_the_spec_at_any_length_with_documents_and_padding(length, kind, dtype):
    x = _inputs(length, kind, dtype)
    ids = np.repeat([[1, 1, 2, 0, 3, 3, 4], [0, 5, 5, 5, 6, 7, 7]], -(-length // 7), axis=1)[:, :length]
    ids = jnp.asarray(ids, jnp.int32)
    exact = jax.tree.map(lambda z: z.astype(jnp.float32), x)

    @partial(jax.jit, static_argnums=1)
    def run(x, implementation):
        def both(x):
            keywords = dict(initial_state=x["h0"], segment_ids=ids, implementation=implementation)
            return _linear_attention(x, **keywords), _delta(x, **keywords)

        results, pull_back = jax.vjp(both, x)
        return results, pull_back(jax.tree.map(jnp.ones_like, results))[0]

    expected, expected_gradients = run(exact, "reference")
    results, gradients = run(x, "chunkwise")
    assert_matches(results, expected, dtype=dtype, scale=2)
    assert_matches(gradients, expected_gradients, dtype=dtype, scale=8 if dtype == "float32" else 2)
    assert all(not np.asarray(o)[np.asarray(ids) == 0].any() for o, _ in results)


# Rules, decays, lengths and a state per row or per segment, each at least once.
@pytest.mark.parametrize(("implementation", "recur", "kind", "length", "dtype", "is_state_of_segment"), [
    ("pallas_tpu", _delta, "channel", 65, "bfloat16", False),
    ("pallas_tpu", _linear_attention, "head", 7, "float32", True),
    ("pallas_gpu", _linear_attention, "head", 65, "bfloat16", False),
    ("pallas_gpu", _delta, "head", 7, "float32", True),
    ("pallas_gpu", _rwkv7, "channel", 20, "float32", False)])
def test_a_kernel_matches_the_spec_with_documents_and_padding(
        implementation, recur, kind, length, dtype, is_state_of_segment):
    x = _inputs(length, kind, dtype)
    if recur is _rwkv7:
        x |= dict(r=x["q"], w=x["g"], a=-x["k"], b=x["k"] * x["beta"][..., None])
    if is_state_of_segment:
        x["h0"] = jnp.stack([x["h0"], 2 * x["h0"], -x["h0"]], axis=1)
    row = [1, 1, 2, 0, 3, 3, 3] if is_state_of_segment else [1, 1, 2, 0, 3, 4, 4]
    ids = jnp.asarray(np.repeat([row, row[::-1]], -(-length // 7), axis=1)[:, :length], jnp.int32)

    @partial(jax.jit, static_argnums=1)
    def run(x, implementation):
        def of(x):
            return recur(x, initial_state=x["h0"], segment_ids=ids, implementation=implementation, interpret=True)

        results, pull_back = jax.vjp(of, x)
        return results, pull_back(jax.tree.map(jnp.ones_like, results))[0]

    expected, expected_gradients = run(jax.tree.map(lambda z: z.astype(jnp.float32), x), "reference")
    results, gradients = run(x, implementation)
    assert_matches(results, expected, dtype=dtype)
    assert_matches(gradients, expected_gradients, dtype=dtype, scale=2)
    assert not np.asarray(results[0])[np.asarray(ids) == 0].any()


@pytest.mark.parametrize("implementation", ["reference", "chunkwise"])
@pytest.mark.parametrize("split", [1, 17, 64])
def test_a_sequence_split_anywhere_equals_the_whole(split, implementation):
    x = _inputs(80, "channel")
    run = jax.jit(lambda x, h0: _delta(x, initial_state=h0, implementation=implementation))
    whole, last = run(x, x["h0"])
    first, state = run({name: z[:, :split] for name, z in x.items() if name != "h0"}, x["h0"])
    second, end = run({name: z[:, split:] for name, z in x.items() if name != "h0"}, state)
    assert_matches((jnp.concatenate([first, second], axis=1), end), (whole, last), dtype="float32", scale=4)


def test_a_complex_state_split_anywhere_equals_the_whole():
    draw = Draw(0)
    x, angle = draw(B, 30, 6) + 1j * draw(B, 30, 6), draw(B, 30, 6)
    a = 0.9 * jnp.exp(1j * angle)
    whole, last = diagonal_recurrence(x, a=a)
    first, state = diagonal_recurrence(x[:, :11], a=a[:, :11])
    second, end = diagonal_recurrence(x[:, 11:], a=a[:, 11:], initial_state=state)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-6)
    np.testing.assert_allclose(end, last, atol=1e-6)


# Lengths: one token, less than a block, a tail, more than one block; with few channels also chunks of time (600).
@pytest.mark.parametrize("implementation", ["auto", *DIAGONAL_KERNELS])
@pytest.mark.parametrize(("length", "reverse", "dtype"), [
    (1, False, "float32"), (7, True, "bfloat16"), (65, True, "float32"), (600, False, "bfloat16")])
def test_a_diagonal_state_is_that_of_the_spec_at_any_length_with_documents_and_padding(
        length, reverse, dtype, implementation, few_rows_at_once):
    draw = Draw(length)
    ids = np.repeat([[1, 1, 2, 0, 3, 3, 4], [0, 5, 5, 5, 6, 7, 7]], -(-length // 7), axis=1)[:, :length]
    x, log_a = draw(2, length, 5, dtype=dtype), (-300 * draw.uniform(2, length, 5) ** 16).astype(dtype)
    initial = draw(2, 5)
    dy, d_last = draw(2, length, 5, dtype=dtype), draw(2, 5)

    def run(implementation, cotangent_dtype, *inputs):
        def of(x, log_a, initial):
            return diagonal_recurrence(
                x, log_a=log_a, initial_state=initial, segment_ids=jnp.asarray(ids, jnp.int32), reverse=reverse,
                implementation=implementation, interpret=True)

        results, pull_back = jax.vjp(of, *inputs)
        return results, pull_back((dy.astype(cotangent_dtype), d_last))

    exact = [z.astype(jnp.float32) for z in (x, log_a)]
    expected, expected_gradients = jax.jit(partial(run, "reference", jnp.float32))(*exact, initial)
    results, gradients = jax.jit(partial(run, implementation, dtype))(x, log_a, initial)
    assert_matches(results, expected, dtype=dtype)
    assert_matches(gradients, expected_gradients, dtype=dtype, scale=2)
    assert results[0].dtype == gradients[0].dtype == gradients[1].dtype == dtype
    assert not np.asarray(results[0])[ids == 0].any()


def test_kernels_refuse_what_they_lack_and_auto_runs_it_otherwise():
    x = np.ones((1, 4, 3), np.float16)
    with pytest.raises(NotImplementedError, match="x is float16; float32, bfloat16 and complex64 fit"):
        diagonal_recurrence(x, log_a=-x, implementation="pallas_tpu", interpret=True)

    def has_kernel(x):
        traced = jax.jit(lambda x: diagonal_recurrence(x, log_a=-x)[0]).trace(x)
        return "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()

    assert not has_kernel(x)
    assert has_kernel(x.astype(np.float32))
    with jax.set_mesh(jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))):
        assert not has_kernel(x.astype(np.float32)), "the compiler cannot split one"


def test_kernels_of_a_matrix_state_refuse_what_they_lack_and_auto_runs_it_by_chunks():
    x = {name: z.astype(jnp.float16) for name, z in _inputs(20, "head").items()}
    with pytest.raises(NotImplementedError, match="q is float16; float32 and bfloat16 fit"):
        _linear_attention(x, implementation="pallas_tpu", interpret=True)

    def num_kernels(x):
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(_linear_attention(x)[0])))
        return gradient.trace(x).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")

    assert num_kernels(x) == 0
    x = {name: z.astype(jnp.bfloat16) for name, z in x.items()}
    assert num_kernels(x) > 0
    with jax.set_mesh(jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))):
        assert num_kernels(x) == 0, "the compiler cannot split one"


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_reverse_is_the_sequence_turned_round(kind):
    x = _inputs(40, kind)
    ids = jnp.asarray(np.repeat([[1, 2, 3, 0], [4, 4, 5, 5]], 10, axis=1), jnp.int32)
    turned = {name: z if name == "h0" else jnp.flip(z, axis=1) for name, z in x.items()}
    o, last = _delta(x, initial_state=x["h0"], segment_ids=ids, reverse=True)
    expected, expected_last = _delta(turned, initial_state=x["h0"], segment_ids=jnp.flip(ids, axis=1))
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
    x = _inputs(7, "head")
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
    x = _inputs(7, "head")
    refused = pytest.raises(ValueError, match=r"as large as 0\.5; it is the natural log of a decay")
    with jax.debug_nans(True), refused:
        jax.block_until_ready(diagonal_recurrence(x["g"], log_a=x["g"].at[1, 3].set(0.5)))
    with jax.debug_nans(True), refused:
        jax.block_until_ready(gated_linear_attention(x["q"], x["k"], x["v"], x["g"].at[0, 3, 1].set(0.5)))


def test_auto_steps_through_tokens_on_a_cpu_and_through_chunks_where_it_is_differentiated():
    x = _inputs(70, "head")

    def run(x, implementation):
        return _delta(x, initial_state=x["h0"], implementation=implementation)[0]

    auto = partial(run, implementation="auto")
    gradient = jax.grad(lambda x: jnp.sum(auto(x) ** 2))
    np.testing.assert_array_equal(jax.jit(auto)(x), jax.jit(partial(run, implementation="reference"))(x))
    expected = jax.grad(lambda x: jnp.sum(run(x, "reference") ** 2))(x)
    assert_matches(jax.jit(gradient)(x), expected, dtype="float32", scale=8)
    lengths = _lengths_of_scans(jax.make_jaxpr(gradient)(x).jaxpr)
    assert lengths and all(length == 3 for length in lengths), lengths


def test_bfloat16_tokens_are_multiplied_by_default_and_decays_and_the_triangle_in_float32():
    def num_exact(dtype, recur):
        x = _inputs(32, "head", dtype)
        text = str(jax.make_jaxpr(lambda x: recur(x, implementation="chunkwise"))(x))
        return text.count("Precision.HIGHEST, Precision.HIGHEST"), text.count("dot_general[")

    assert num_exact("float32", _linear_attention) == (5, 5)
    assert num_exact("bfloat16", _linear_attention) == (1, 5), "sums of log decays"
    exact, all_of_delta = num_exact("bfloat16", lambda x, **keywords: _delta(x | {"beta": None}, **keywords))
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
