"""The diagonal recurrence against the official vectors and its spec: outputs, states and gradients."""
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import diagonal_recurrence
from layers.recurrences.diagonal import pallas_gpu
from tests.support.assertions import assert_golden, assert_matches
from tests.support.golden_cases import assert_golden_case, golden_case
from tests.support.inputs import Draw

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
    data = golden_case("rec_diag", case)
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
    for case in ("c2",) if implementation in DIAGONAL_KERNELS else ("c0", "c1", "c2"):
        data = golden_case("rec_hgrn", case)
        segments = None if "segment_ids" not in data else jnp.asarray(data["segment_ids"])

        def run(x, segments=segments):
            initial = x.get("h0")
            if segments is not None:
                initial = initial[None]  # one per segment of the only row
            return diagonal_recurrence(x["x"], log_a=x["g"], initial_state=initial, segment_ids=segments,
                                       implementation=implementation, interpret=True)

        assert_golden_case(run, data, "x g h0", "o ht")


def test_a_complex_state_split_anywhere_equals_the_whole():
    draw = Draw(0)
    x, angle = draw(2, 30, 6) + 1j * draw(2, 30, 6), draw(2, 30, 6)
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
def test_diagonal_recurrence_matches_reference_with_segments(
        length, reverse, dtype, implementation, few_rows_at_once):
    draw = Draw(length)
    ids = np.repeat([[1, 1, 2, 0, 3, 3, 4], [0, 5, 5, 5, 6, 7, 7]], -(-length // 7), axis=1)[:, :length]
    x, log_a = draw(2, length, 5, dtype=dtype), (-300 * draw.uniform(2, length, 5) ** 16).astype(dtype)
    initial = draw(2, 5)
    dy, d_last = draw(2, length, 5, dtype=dtype), draw(2, 5)

    def run(implementation, cotangent_dtype, *inputs):
        def recur(x, log_a, initial):
            return diagonal_recurrence(
                x, log_a=log_a, initial_state=initial, segment_ids=jnp.asarray(ids, jnp.int32), reverse=reverse,
                implementation=implementation, interpret=True)

        results, pull_back = jax.vjp(recur, *inputs)
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
