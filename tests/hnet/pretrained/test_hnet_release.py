"""Parameters under official names, read and written, and config files: every shape of model, what is refused."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet import (
    HNetConfig,
    HNetLM,
    RecurrenceConfig,
    from_official_json,
    load_official_params,
    parameter_shapes,
    to_official_json,
    to_official_params,
)
from hnet.pretrained.hnet_release import official_shapes
from tests.support.assertions import golden
from tests.support.models import make_stage

OUTER = dict(num_heads=2, rotary_width=8, state_size=8, feed_forward_width=128)
ATTENTION_OUTSIDE = HNetConfig(vocab_size=50, stages=(
    make_stage(width=32, encoder="T1m1", decoder="t2", **OUTER),
    make_stage(width=32, encoder="M2", **OUTER)))
ISOTROPIC = HNetConfig(vocab_size=50, stages=(make_stage(width=32, encoder="T2m1", **OUTER),))
PAD_ONLY_INSIDE = HNetConfig(vocab_size=50, stages=(
    make_stage(width=32, encoder="m1", decoder="m1", **{**OUTER, "feed_forward_width": 0}),
    make_stage(width=32, encoder="m1", decoder="m1", **{**OUTER, "feed_forward_width": 0}),
    make_stage(width=64, encoder="T1", **OUTER)))
TIED = dataclasses.replace(ATTENTION_OUTSIDE, tie_embeddings=True)
CONFIGS = {"attention outside": ATTENTION_OUTSIDE, "isotropic": ISOTROPIC, "pad inside": PAD_ONLY_INSIDE,
           "tied": TIED}
GOLDEN_MODELS = pytest.mark.parametrize("name", ["hnet_a_1stage", "hnet_b_2stage"])


def _official(config, draw):
    """A state dict with the official names and shapes of `config`, filled by draw(shape)."""
    return {name: draw(shape) for name, shape in official_shapes(config).items()}


def _golden_model(name):
    data = golden(name)
    state = {key.removeprefix("param/"): value for key, value in data.items() if key.startswith("param/")}
    return str(data["config_json"]), state


@GOLDEN_MODELS
def test_official_shapes_are_those_of_the_release(name):
    text, state = _golden_model(name)
    shapes = official_shapes(from_official_json(text))
    assert shapes == {name: value.shape for name, value in state.items()}


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
    params = load_official_params(state | {"lm_head.weight": np.zeros((50, 32))}, TIED)
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
    """The part of a torch tensor that this module uses, bfloat16 included, which numpy lacks."""

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
    text, state = _golden_model("hnet_a_1stage")
    config = from_official_json(text)
    torch_state = {name: FakeTorchTensor(value, 2) for name, value in state.items()}
    jax.tree.map(np.testing.assert_array_equal, load_official_params(torch_state, config),
                 load_official_params(state, config))


def test_names_and_shapes_that_do_not_fit_are_refused():
    state = _official(ATTENTION_OUTSIDE, np.zeros)
    missing = {name: value for name, value in state.items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"1 names missing \(lm_head.weight\)"):
        load_official_params(missing, ATTENTION_OUTSIDE)
    with pytest.raises(ValueError, match=r"1 names unexpected \(extra\)"):
        load_official_params(state | {"extra": np.zeros(3)}, ATTENTION_OUTSIDE)
    name = "backbone.encoder.layers.0.mixer.Wqkv.weight"
    with pytest.raises(ValueError, match=r"Wqkv\.weight has shape \(48, 12\), and \(96, 32\) in this config"):
        load_official_params(state | {name: np.zeros((48, 12))}, ATTENTION_OUTSIDE)


@GOLDEN_MODELS
def test_a_released_model_comes_back_bit_for_bit(name):
    text, state = _golden_model(name)
    config = from_official_json(text)
    back = to_official_params(load_official_params(state, config), config)
    assert back.keys() == state.keys()
    for tensor in state:
        np.testing.assert_array_equal(back[tensor], state[tensor], strict=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_go_to_official_names_and_back_bit_for_bit(name):
    config, rng = CONFIGS[name], np.random.default_rng(0)
    state = _official(config, lambda shape: rng.standard_normal(shape).astype(np.float32))
    params = load_official_params(state, config)
    back = to_official_params(params, config)
    head = {"lm_head.weight": state["embeddings.weight"]} if config.tie_embeddings else {}
    assert back.keys() == (state | head).keys()
    for tensor, value in (state | head).items():
        np.testing.assert_array_equal(back[tensor], value, strict=True)
    jax.tree.map(np.testing.assert_array_equal, load_official_params(back, config), params)


def test_each_tensor_is_fetched_once():
    """So that a mapping may read them from a file, one at a time."""
    fetched = []

    class Counting(dict):
        def __getitem__(self, name):
            fetched.append(name)
            return super().__getitem__(name)

    load_official_params(Counting(_official(PAD_ONLY_INSIDE, np.zeros)), PAD_ONLY_INSIDE)
    assert sorted(fetched) == sorted(official_shapes(PAD_ONLY_INSIDE))


@GOLDEN_MODELS
def test_the_config_file_of_a_released_model_comes_back(name):
    text, _ = _golden_model(name)
    config = from_official_json(text)
    written = json.loads(to_official_json(config))
    official = json.loads(text)
    official["d_intermediate"] = [-(-width // 128) * 128 for width in official["d_intermediate"]]
    official["ssm_cfg"]["chunk_size"] = 256  # changes no result
    assert written == official


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files_round_trip(name):
    assert from_official_json(to_official_json(CONFIGS[name])) == CONFIGS[name]


def test_what_differs_between_stages_is_written_as_a_list():
    stages = list(PAD_ONLY_INSIDE.stages)
    stages[1] = stages[1].with_stack(recurrence=RecurrenceConfig(state_size=16, expand=4))
    config = dataclasses.replace(PAD_ONLY_INSIDE, stages=tuple(stages))
    assert json.loads(to_official_json(config))["ssm_cfg"] == {
        "chunk_size": 256, "d_conv": 4, "d_state": [8, 16, 8], "expand": [2, 4, 2]}
    assert from_official_json(to_official_json(config)) == config


@pytest.mark.parametrize(("fields", "message"), [
    (dict(router="stride"), "has no word for stage0.chunking.router 'stride': it is always 'learned' there"),
    (dict(downsampler="mean"), "has no word for stage0.chunking.downsampler 'mean': it is always 'first' there"),
    (dict(upsampler="none"), "has no word for stage0.chunking.upsampler 'none': it is always 'smooth' there"),
    (dict(head_width=16), "has no word for stage0.stack.recurrence.head_width 16: it is always 64 there"),
    (dict(feed_forward_width=100), "needs a stage0.stack.feed_forward_width that is a multiple of 128, not 100"),
    (dict(width=16, expand=4), "needs a stage0.stack.width that is a multiple of 32, not 16"),
])
def test_models_that_the_release_does_not_have_are_refused(fields, message):
    inner = ATTENTION_OUTSIDE.stages[-1]
    outer = make_stage(**dict(width=32, encoder="T1m1", decoder="t2", **OUTER) | fields)
    config = dataclasses.replace(ATTENTION_OUTSIDE, stages=(outer, inner))
    for write in (to_official_json, lambda config: to_official_params({}, config)):
        with pytest.raises(ValueError) as refusal:
            write(config)
        assert message in str(refusal.value)


def test_routers_without_parameters_ask_for_none_and_what_only_computes_differently_is_left_out():
    outer, inner = ATTENTION_OUTSIDE.stages
    config = dataclasses.replace(
        ATTENTION_OUTSIDE, stages=(outer.with_chunking(router="stride"), inner))
    state = _official(config, np.zeros)
    assert not [name for name in state if "routing_module" in name]
    params = load_official_params(state, config)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, parameter_shapes(config))
    faster = dataclasses.replace(ATTENTION_OUTSIDE, dtype="bfloat16")
    faster = faster.with_chunking(capacity=0.5).with_stack(remat="block")
    assert to_official_json(faster) == to_official_json(ATTENTION_OUTSIDE)
