from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import ssd_scan
from tests.support.assertions import GOLDEN_LAYER_LIMIT, assert_golden, assert_matches, golden
from tests.support.inputs import Draw

IMPLEMENTATIONS = [("reference", 64), ("chunkwise", 16)]


def _inputs(t, dtype, hostile):
    draw = Draw(seed=t)
    x, b, c = draw(2, t, 4, 12, dtype=dtype), draw(2, t, 2, 8, dtype=dtype), draw(2, t, 2, 8, dtype=dtype)
    log_decay = -np.logaddexp(0, np.asarray(draw(2, t, 4)))
    if hostile:  # -300 wipes a state, 0 keeps it for ever
        kind = draw.rng.integers(0, 4, log_decay.shape)
        log_decay = np.select([kind == 0, kind == 1, kind == 2], [-300.0, -1e-7, 0.0], log_decay)
    cotangent = draw(2, t, 4, 12, dtype=dtype), draw(2, 4, 8, 12)
    return (x, jnp.asarray(log_decay, jnp.float32), b, c, draw(2, 4, 8, 12)), cotangent


def _segments(t):
    ids = np.ones((2, t), np.int32)
    ids[1] = np.searchsorted([t // 4, t // 4 + 1, t // 2], np.arange(t), side="right") + 1
    ids[1, t - t // 5 :] = 0
    ids[1, : t // 9] = 0
    return jnp.asarray(ids)


def _run(x, log_decay, b, c, state, **options):
    return ssd_scan(x, log_decay, b, c, initial_state=state, **options)


@pytest.mark.parametrize(("t", "hostile", "dtype"), [
    (1, True, "float32"), (7, False, "bfloat16"), (64, False, "float32"), (150, True, "float32"),
    (150, True, "bfloat16")])
def test_chunkwise_matches_reference_in_value_gradient_and_final_state(t, hostile, dtype):
    inputs, cotangent = _inputs(t, dtype, hostile)
    segment_ids = _segments(t)  # row 0 is one segment, row 1 several with padding

    def values_and_gradients(inputs, cotangent, implementation):
        run = partial(_run, segment_ids=segment_ids, implementation=implementation)
        values, vjp = jax.vjp(run, *inputs)
        return values, vjp(cotangent)

    exact = jax.tree.map(lambda z: z.astype(jnp.float32), (inputs, cotangent))
    run = jax.jit(values_and_gradients, static_argnums=2)
    (expected, expected_gradients) = run(*exact, "reference")
    (actual, gradients) = run(inputs, cotangent, "chunkwise")
    assert actual[0].dtype == jnp.dtype(dtype) and actual[1].dtype == jnp.float32
    assert_matches(actual, expected, dtype=dtype)
    assert_matches(gradients, expected_gradients, dtype=dtype, scale=2)


@pytest.mark.parametrize(("implementation", "chunk_size"), IMPLEMENTATIONS)
def test_official_scan_golden_with_groups_segments_and_states(implementation, chunk_size):
    data = golden("hnet_ssd_scan")
    segment_ids = jnp.asarray(data["seq_idx"] + 1)

    def run(x, dt, a, b, c, d, **options):
        y, state = ssd_scan(x * dt[..., None], dt * a, b, c, implementation=implementation,
                            chunk_size=chunk_size, **options)
        return y + d[:, None] * x, jnp.swapaxes(state, -1, -2)  # the release keeps states [b, h, p, n]

    inputs = [jnp.asarray(data[name]) for name in ("x", "dt", "A", "B", "C", "D")]
    check = partial(assert_golden, limit=GOLDEN_LAYER_LIMIT)
    run = jax.jit(run)
    check(run(*inputs), (data["y"], data["final_state"]))
    initial = jnp.swapaxes(jnp.asarray(data["initial_state"]), -1, -2)
    check(run(*inputs, initial_state=initial), (data["y_initial"], data["final_state_initial"]))
    run_packed = partial(run, segment_ids=segment_ids)
    check(run_packed(*inputs), (data["y_seq_idx"], data["final_state_seq_idx"]))
    gradient = jax.grad(lambda *z: jnp.sum(run_packed(*z)[0] * data["grad_y"]), argnums=range(6))(*inputs)
    check(gradient, tuple(data[f"grad_seq_idx/{name}"] for name in ("x", "dt", "A", "B", "C", "D")))


@pytest.mark.parametrize(("implementation", "chunk_size"), IMPLEMENTATIONS)
def test_a_split_sequence_with_carried_state_equals_the_whole(implementation, chunk_size):
    (x, log_decay, b, c, state), _ = _inputs(50, "float32", hostile=False)
    run = jax.jit(partial(_run, implementation=implementation, chunk_size=chunk_size))
    whole = run(x, log_decay, b, c, state)
    first, state = run(x[:, :23], log_decay[:, :23], b[:, :23], c[:, :23], state)
    second, state = run(x[:, 23:], log_decay[:, 23:], b[:, 23:], c[:, 23:], state)
    assert_matches((jnp.concatenate([first, second], axis=1), state), whole, dtype="float32")


@pytest.mark.parametrize(("implementation", "chunk_size"), IMPLEMENTATIONS)
def test_padding_is_silent_and_leaves_the_state_alone(implementation, chunk_size):
    inputs, _ = _inputs(40, "float32", hostile=False)
    ids = jnp.zeros((2, 40), jnp.int32).at[0, 10:20].set(1)
    run = jax.jit(partial(_run, implementation=implementation, chunk_size=chunk_size))
    y, state = run(*inputs, segment_ids=ids)
    assert (np.asarray(y)[np.asarray(ids) == 0] == 0).all()
    np.testing.assert_array_equal(state[1], inputs[-1][1])
    alone = [z[:1, 10:20] for z in inputs[:-1]] + [inputs[-1][:1]]
    expected = run(*alone)
    assert_matches((y[:1, 10:20], state[:1]), expected, dtype="float32")


def test_backward_pass_keeps_one_state_per_chunk_not_per_token():
    draw = Draw(0)
    inputs = draw(1, 1024, 2, 32), -jnp.abs(draw(1, 1024, 2)), draw(1, 1024, 1, 32), draw(1, 1024, 1, 32)

    def temporary_bytes(implementation):
        def loss(*inputs):
            return jnp.sum(ssd_scan(*inputs, implementation=implementation)[0] ** 2)

        gradient = jax.jit(jax.grad(loss, argnums=range(4)))
        return gradient.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("chunkwise") < temporary_bytes("reference") / 4


def test_refuses_heads_that_cannot_share_groups():
    (x, log_decay, b, c, _), _ = _inputs(8, "float32", hostile=False)
    with pytest.raises(ValueError, match="2 heads, which must divide the 3 of v"):
        ssd_scan(x[:, :, :3], log_decay[:, :, :3], b, c)
