"""Kernels are chosen by the platform of the program, and refused where arrays may be spread over devices."""
import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layers import diagonal_recurrence, gated_linear_attention, sliding_window_attention
from layers.arrays.dispatch import by_platform, log_once


def _attention(x, implementation):
    return sliding_window_attention(x, x, x, window=128, implementation=implementation)


def _matrix(x, implementation):
    return gated_linear_attention(x, x, x, implementation=implementation)[0]


def _diagonal(x, implementation):
    x = x[:, :, 0]
    return diagonal_recurrence(x, log_a=-jnp.abs(x), implementation=implementation)[0]


OPS = {"block_sparse_attention": _attention, "matrix_recurrence": _matrix, "diagonal_recurrence": _diagonal}


def _array():
    return jnp.ones((2, 256, 2, 64))


def _mesh():
    return jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2)


def _num_kernels(op, x, implementation="auto"):
    """Counts the kernels of a program for TPU, with its gradient."""
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(op(x, implementation))))
    return gradient.trace(x).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")


@pytest.mark.parametrize("name", OPS)
def test_auto_runs_no_kernel_under_a_mesh_of_several_devices_and_says_why(name, caplog):
    assert _num_kernels(OPS[name], _array()) > 0
    log_once.cache_clear()
    with caplog.at_level(logging.INFO), jax.set_mesh(_mesh()):
        assert _num_kernels(OPS[name], _array()) == 0
    messages = [record.message for record in caplog.records if f"{name} runs as" in record.message]
    assert any("arrays may be spread over a mesh of {'data': 2, 'model': 2}" in message for message in messages)
    assert len(messages) == len(set(messages)), "each is logged once"


@pytest.mark.parametrize("name", OPS)
def test_auto_runs_no_kernel_on_arrays_that_are_spread_without_a_mesh_in_use(name):
    spread = jax.device_put(_array(), NamedSharding(_mesh(), PartitionSpec("data")))
    assert _num_kernels(OPS[name], spread) == 0


@pytest.mark.parametrize("name", OPS)
def test_a_kernel_asked_for_by_name_is_refused_under_a_mesh(name):
    refused = pytest.raises(NotImplementedError, match=r'"pallas_tpu": arrays may be spread over a mesh of .*data')
    with jax.set_mesh(_mesh()), refused:
        jax.eval_shape(lambda x: OPS[name](x, "pallas_tpu"), _array())


@pytest.mark.parametrize("name", OPS)
def test_inside_shard_map_a_kernel_runs_on_each_device(name):
    sharded = jax.shard_map(lambda x: OPS[name](x, "auto"), mesh=_mesh(), in_specs=PartitionSpec("data"),
                            out_specs=PartitionSpec("data"), check_vma=False)
    text = jax.jit(sharded).trace(_array()).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text


def test_a_kernel_with_a_reason_leaves_its_platform_to_the_default(caplog):
    run = {"tpu": lambda x: x + 1, "cuda": lambda x: x + 2, "cpu": lambda x: x + 3, "default": lambda x: x + 4}

    def constants(platform, **keywords):
        traced = jax.jit(lambda x: by_platform("an_op", run, x, **keywords)).trace(1.0)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "1.0" in constants("tpu") and "2.0" in constants("cuda") and "3.0" in constants("cpu")
    with caplog.at_level(logging.INFO):
        text = constants("tpu", reasons={"tpu": "too wide", "cuda": None}, fallback="slow")
    assert "4.0" in text and "an_op runs as slow on tpu: too wide" in caplog.text and "cuda" not in caplog.text
    with pytest.raises(NotImplementedError, match='implementation="pallas_gpu": too long'):
        by_platform("an_op", run, 1.0, reasons={"cuda": "too long"}, implementation="pallas_gpu")
