"""Loading parameters under official names: every shape of model, and what is refused."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet import HNetConfig, HNetLM, StageConfig, load_official_params, parameter_shapes
from hnet.official import relabelling
from tests.assertions import golden

OUTER = dict(num_heads=2, rotary_width=8, ssm_state_size=8, ssm_head_width=16, feed_forward_width=128)
ATTENTION_OUTSIDE = HNetConfig(vocab_size=50, stages=(
    StageConfig(width=16, encoder="T1m1", decoder="t2", **OUTER),
    StageConfig(width=16, encoder="M2", decoder="", **OUTER)))
ISOTROPIC = HNetConfig(vocab_size=50, stages=(StageConfig(width=16, encoder="T2m1", decoder="", **OUTER),))
PAD_ONLY_INSIDE = HNetConfig(vocab_size=50, stages=(
    StageConfig(width=16, encoder="m1", decoder="m1", **OUTER),
    StageConfig(width=16, encoder="m1", decoder="m1", **OUTER),
    StageConfig(width=32, encoder="T1", decoder="", **OUTER)))
TIED = dataclasses.replace(ATTENTION_OUTSIDE, tie_embeddings=True)
CONFIGS = {"attention outside": ATTENTION_OUTSIDE, "isotropic": ISOTROPIC, "pad inside": PAD_ONLY_INSIDE,
           "tied": TIED}


def _official(config, draw):
    """A state dict with the official names and shapes of `config`, filled by draw(shape)."""
    widths = [stage.width for stage in config.stages]
    state = {}
    for entry in relabelling(config):
        name = entry.official
        width = widths[min(name.count("main_network"), len(widths) - 1)]
        inner = 2 * width
        shape = {
            "embeddings.weight": (50, 16), "lm_head.weight": (50, 16),
            "in_proj.weight": (2 * inner + 16 + inner // 16, width),
            "conv1d.weight": (inner + 16, 1, 4), "conv1d.bias": (inner + 16,), "dt_bias": (inner // 16,),
            "A_log": (inner // 16,), "D": (inner // 16,), "Wqkv.weight": (3 * width, width),
            "fc1.weight": (256, width), "fc2.weight": (width, 128), "residual_proj.weight": (width, width),
            "q_proj_layer.weight": (width, width), "k_proj_layer.weight": (width, width),
        }
        suffix = next((s for s in shape if name.endswith(s)), None)
        if name.endswith("mixer.out_proj.weight"):
            is_ssm = name.replace("out_proj.weight", "A_log") in {e.official for e in relabelling(config)}
            state[name] = draw((width, inner if is_ssm else width))
        elif name.endswith("mixer.norm.weight"):
            state[name] = draw((inner,))
        elif name.endswith("pad_dimension"):
            state[name] = draw((width - widths[name.count("main_network") - 1],))
        else:
            state[name] = draw(shape[suffix] if suffix else (width,))
    return state


@pytest.mark.parametrize("name", CONFIGS)
def test_every_official_tensor_lands_whole_in_parameters_that_run(name):
    config = CONFIGS[name]
    counter = iter(range(10**6))

    def draw(shape):  # distinct numbers, so that a lost or doubled element shows
        return np.array([next(counter) for _ in range(int(np.prod(shape)))], np.float32).reshape(shape)

    state = _official(config, draw)
    params = load_official_params(state, config)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, parameter_shapes(config))
    ours = np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]))
    official = np.sort(np.concatenate([value.ravel() for value in state.values()]))
    np.testing.assert_array_equal(ours, official)


def test_a_tied_head_is_the_embedding_and_lm_head_is_not_read():
    rng = np.random.default_rng(0)
    state = _official(TIED, lambda shape: rng.standard_normal(shape).astype(np.float32) / 4)
    assert "lm_head.weight" not in state
    params = load_official_params(state | {"lm_head.weight": np.zeros((50, 16))}, TIED)
    assert "lm_head" not in params
    tokens = jnp.arange(12).reshape(2, 6)
    untied = load_official_params(state | {"lm_head.weight": state["embeddings.weight"]}, ATTENTION_OUTSIDE)
    tied, untied = (
        jax.jit(HNetLM(config).apply)({"params": params}, tokens).logits
        for config, params in ((TIED, params), (ATTENTION_OUTSIDE, untied)))
    np.testing.assert_array_equal(tied, untied)


def test_attention_outside_and_no_hierarchy_run_and_only_chunking_stages_report():
    rng = np.random.default_rng(0)
    for config, stages in ((ISOTROPIC, set()), (PAD_ONLY_INSIDE, {"stage0", "stage1"})):
        state = _official(config, lambda shape: rng.standard_normal(shape).astype(np.float32) / 4)
        params = load_official_params(state, config)
        output = jax.jit(HNetLM(config).apply)({"params": params}, np.arange(12).reshape(2, 6))
        assert set(output.stages) == stages and np.isfinite(output.logits).all()


def test_loading_is_linear():
    rng = np.random.default_rng(0)
    a, b = (_official(ATTENTION_OUTSIDE, rng.standard_normal) for _ in range(2))
    both = {name: 2 * a[name] - b[name] for name in a}
    load = lambda state: load_official_params(state, ATTENTION_OUTSIDE)  # noqa: E731
    jax.tree.map(lambda x, y, z: np.testing.assert_allclose(2 * x - y, z, atol=1e-5), load(a), load(b), load(both))


class FakeTorchTensor:
    """What this module uses of a torch tensor, bfloat16 included, which numpy does not know."""

    def __init__(self, array, itemsize):
        self.array, self.dtype = array, type("dtype", (), {"itemsize": itemsize})

    def detach(self):
        return self

    cpu = detach

    def float(self):
        return FakeTorchTensor(self.array, 4)

    def numpy(self):
        assert self.dtype.itemsize >= 4, "numpy has no bfloat16"
        return self.array


def test_reads_torch_tensors():
    data = golden("hnet_a_1stage")
    config = HNetConfig.from_official_json(str(data["config_json"]))
    state = {key.removeprefix("param/"): value for key, value in data.items() if key.startswith("param/")}
    torch_state = {name: FakeTorchTensor(value, 2) for name, value in state.items()}
    jax.tree.map(np.testing.assert_array_equal, load_official_params(torch_state, config),
                 load_official_params(state, config))


def test_names_and_shapes_that_do_not_fit_are_refused():
    state = _official(ATTENTION_OUTSIDE, np.zeros)
    missing = {name: value for name, value in state.items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"1 names missing \['lm_head.weight'\]"):
        load_official_params(missing, ATTENTION_OUTSIDE)
    with pytest.raises(ValueError, match=r"1 unknown \['extra'\]"):
        load_official_params(state | {"extra": np.zeros(3)}, ATTENTION_OUTSIDE)
    name = "backbone.encoder.layers.0.mixer.Wqkv.weight"
    with pytest.raises(ValueError, match=r"Wqkv\.weight has shape .*check d_model"):
        load_official_params(state | {name: np.zeros((48, 12))}, ATTENTION_OUTSIDE)
