"""The official initialisation, read off freshly drawn parameters."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import unbox

from hnet import HNetConfig, HNetLM
from hnet.model import residual_depth, stage_depth
from tests.support.models import make_stage

FIELDS = dict(num_heads=4, rotary_width=8, feed_forward_width=256, state_size=64)
CONFIG = HNetConfig(stages=(
    make_stage(width=128, encoder="m1", decoder="m1", **FIELDS),
    make_stage(width=192, encoder="T1", **FIELDS)))


@pytest.fixture(scope="module")
def params():
    init = jax.jit(lambda: unbox(HNetLM(CONFIG).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))))
    return init()["params"]


def test_projections_into_the_residual_stream_shrink_with_depth(params):
    assert stage_depth(CONFIG.stages[:1]) == residual_depth("m1", "m1") == 2
    assert stage_depth(CONFIG.stages) == 4  # and T1, which writes twice
    outer = params["stage0"]["encoder"]["run0"]["mixer"]
    np.testing.assert_allclose(np.std(outer["x_proj"]["kernel"]), 0.02, rtol=0.05)
    np.testing.assert_allclose(np.std(outer["out"]["kernel"]), 0.02 / 2**0.5, rtol=0.05)
    inner = params["stage0"]["stage1"]["encoder"]["run0"]
    np.testing.assert_allclose(np.std(inner["mixer"]["qkv"]["kernel"]), 0.02, rtol=0.05)
    np.testing.assert_allclose(np.std(inner["mixer"]["out"]["kernel"]), 0.02 / 4**0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(inner["feed_forward"]["out"]["kernel"]), 0.02 / 4**0.5, rtol=0.05)


def test_router_residual_and_padding_start_neutral(params):
    stage = params["stage0"]
    for name in ("query", "key"):
        np.testing.assert_array_equal(stage["router"][name]["kernel"], np.eye(128))
    assert (stage["residual_proj"]["kernel"] == 0).all()
    bias = np.abs(stage["residual_proj"]["bias"])
    assert 0 < bias.max() <= 128**-0.5
    assert (stage["stage1"]["pad_dimension"] == 0).all() and stage["stage1"]["pad_dimension"].shape == (64,)


def test_embedding_and_head(params):
    np.testing.assert_allclose(np.std(params["embedding"]), 1.0, rtol=0.02)
    np.testing.assert_allclose(np.std(params["lm_head"]), 0.02, rtol=0.02)
