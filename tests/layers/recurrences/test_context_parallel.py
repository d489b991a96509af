"""Recurrences whose time is sharded over devices equal those that have all of it, in values and gradients."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layers import diagonal_recurrence, dplr_recurrence, gated_delta_rule, gated_linear_attention
from tests.support.assertions import assert_matches
from tests.support.inputs import Draw

SHARDS, SHARD = 8, 4
B, T, H, K, V, D = 2, SHARDS * SHARD, 2, 4, 6, 5
MESH = jax.make_mesh((SHARDS,), ("time",), axis_types=(AxisType.Auto,))
# Segments begin at an edge, one token before and one after, and within; shards of padding are within and last.
IDS = jnp.asarray([
    [0] * 2 + [1] * 5 + [2] * 1 + [3] * 5 + [4] * 2 + [5] * 5 + [0] * 9 + [6] * 3,
    [7] * 20 + [0] * 12,
], jnp.int32)


def _inputs(*names):
    draw = Draw(len(names))
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    made = {
        "q": lambda: draw(B, T, 1, K), "k": lambda: unit(draw(B, T, 1, K)), "v": lambda: draw(B, T, H, V),
        "beta": lambda: 2 * draw.uniform(B, T, H), "of_head": lambda: -0.2 * jnp.abs(draw(B, T, H)),
        "x": lambda: draw(B, T, D), "log_a": lambda: -jnp.abs(draw(B, T, D)),
        "size": lambda: draw.uniform(B, T, D),
        "of_channel": lambda: -10 * draw.uniform(B, T, H, K) ** 8, "per_head": lambda: unit(draw(B, T, H, K)),
    }
    return [made[name]() for name in names]


def _real_diagonal(x, log_a, **keywords):
    return diagonal_recurrence(x, log_a=log_a, **keywords)


def _complex_diagonal(x, y, size, angle, **keywords):
    return diagonal_recurrence(jax.lax.complex(x, y), a=size * jnp.exp(1j * angle), **keywords)


def _rwkv7(r, w, k, v, removed, rate, **keywords):
    return dplr_recurrence(r, w, k, v, -removed, removed * rate[..., None], **keywords)


FAMILIES = {
    "real diagonal": (_real_diagonal, ("x", "log_a"), (D,), "float32"),
    "complex diagonal": (_complex_diagonal, ("x", "x", "size", "log_a"), (D,), "complex64"),
    "linear attention": (gated_linear_attention, ("q", "k", "v", "of_channel"), (H, K, V), "float32"),
    "delta rule": (gated_delta_rule, ("q", "k", "v", "beta", "of_head"), (H, K, V), "float32"),
    "diagonal plus low rank": (
        _rwkv7, ("per_head", "of_channel", "per_head", "v", "per_head", "beta"), (H, K, V), "float32"),
}


@pytest.mark.parametrize(("family", "reverse"), [
    *((family, False) for family in FAMILIES), ("complex diagonal", True), ("delta rule", True)])
def test_time_may_be_sharded(family, reverse):
    recur, names, shape, dtype = FAMILIES[family]
    inputs, initial = _inputs(*names), Draw(9)(B, *shape).astype(dtype)

    def run(ids, initial, *inputs, axis_name=None):
        y, last = recur(*inputs, initial_state=initial, segment_ids=ids, reverse=reverse, axis_name=axis_name)
        return jnp.real(y) + jnp.imag(y), jnp.real(last) + jnp.imag(last)

    over_time = P(None, "time")
    sharded = jax.shard_map(
        partial(run, axis_name="time"), mesh=MESH, in_specs=(over_time, P(), *(over_time for _ in inputs)),
        out_specs=(over_time, P()), check_vma=False)

    @partial(jax.jit, static_argnums=0)
    def values_and_gradients(run, *inputs):
        values, pull_back = jax.vjp(partial(run, IDS), *inputs)
        return values, pull_back(jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size)).reshape(y.shape), values))

    expected = values_and_gradients(run, initial, *inputs)
    assert_matches(values_and_gradients(sharded, initial, *inputs), expected, dtype="float32", scale=4)
    assert np.any(expected[1][0]), "the initial state counts"


def test_a_state_per_segment_is_refused_where_time_is_sharded():
    states = jnp.zeros((B, 3, H, K, V))
    sharded = jax.shard_map(
        lambda *x: gated_linear_attention(*x, initial_state=states, axis_name="time")[0], mesh=MESH,
        in_specs=P(None, "time"), out_specs=P(None, "time"))
    with pytest.raises(NotImplementedError, match="a state per segment"):
        sharded(*_inputs("q", "k", "v"))
