"""Llama and its relatives: parity with the transformers library, every config both ways, what is refused."""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet import (
    HNetLM,
    llama_config,
    load_llama_params,
    parameter_shapes,
    to_llama_config,
    to_llama_params,
)
from hnet.pretrained.llama import llama_shapes
from layers import RotaryScaling
from tests.support.assertions import GOLDEN_LOGITS_ERROR, SAME_COMPUTATION, golden
from tests.support.models import one_stage_config

SIZES = {"vocab_size": 29, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 64}
KINDS = {
    "llama": {}, "as many key heads": {"num_key_value_heads": 4}, "tied": {"tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "mistral, all seen": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, as many key heads": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen2, all layers slide": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0,
                                "sliding_window": 7},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 128},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0,
             "beta_slow": 2.0},
}


def _config(**fields):
    return llama_config({"model_type": "llama", **SIZES, **fields})


def _state(config):
    """A state dict of distinct numbers, so that a lost, doubled or misplaced element shows."""
    counter = iter(range(10**6))
    return {name: np.array([next(counter) for _ in range(int(np.prod(shape)))], np.float32).reshape(shape)
            for name, shape in llama_shapes(config).items()}


def test_logits_are_those_of_the_transformers_library():
    data = golden("sys_graph_kv")
    heads, key_heads, head_width, num_layers, base, epsilon = data["cfg_heads_kv_hd_layers_theta_eps"].tolist()
    state = {name.removeprefix("param/"): value for name, value in data.items() if name.startswith("param/")}
    vocab_size, width = state["model.embed_tokens.weight"].shape
    config = llama_config({
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": width, "rms_norm_eps": epsilon,
        "intermediate_size": state["model.layers.0.mlp.up_proj.weight"].shape[0], "rope_theta": base,
        "num_hidden_layers": int(num_layers), "num_attention_heads": int(heads), "head_dim": int(head_width),
        "num_key_value_heads": int(key_heads)})
    params = load_llama_params(state, config)
    expected = data["full/stage1_logits_padded"]
    tokens, segment_ids = np.zeros((2, *expected.shape[:2]), np.int32)
    for row in range(len(expected)):
        context = data[f"ctx{row}"]
        tokens[row, :len(context)], segment_ids[row, :len(context)] = context, 1
    logits = jax.jit(HNetLM(config).apply)({"params": params}, tokens, segment_ids).logits
    error = np.abs(logits - expected)[segment_ids != 0]
    assert error.size == sum(len(data[f"ctx{row}"]) for row in range(len(expected))) * vocab_size
    assert error.max() <= GOLDEN_LOGITS_ERROR / 10, error.max()


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_lands_whole_and_comes_back_bit_for_bit(kind):
    config = _config(**KINDS[kind])
    state = _state(config)
    params = load_llama_params(state, config)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, parameter_shapes(config))
    back = to_llama_params(params, config)
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value, strict=True)


def test_query_key_value_gate_and_up_stand_where_the_layers_read_them():
    for key_heads, name, rows in ((4, "qkv", slice(8, 16)), (2, "q", slice(8, 16))):
        config = _config(num_key_value_heads=key_heads)
        state = _state(config)
        block = load_llama_params(state, config)["stage0"]["encoder"]["run0"]
        kernel = block["mixer"][name]["kernel"][1]  # of layer 1: [in, (3,) heads, head width]
        query = kernel[:, 0] if name == "qkv" else kernel
        np.testing.assert_array_equal(query[:, 1].T, state["model.layers.1.self_attn.q_proj.weight"][rows])
        value_gate = block["feed_forward"]["value_gate"]["kernel"][0]
        np.testing.assert_array_equal(value_gate[:, 0].T, state["model.layers.0.mlp.up_proj.weight"])
        np.testing.assert_array_equal(value_gate[:, 1].T, state["model.layers.0.mlp.gate_proj.weight"])


def test_norms_of_queries_and_keys_have_the_epsilon_of_the_others():
    config = _config(model_type="qwen3", num_hidden_layers=1, rms_norm_eps=0.5)
    state = {name: np.cos(value) / 4 for name, value in _state(config).items()}
    tokens = np.arange(5)[None]
    apply = jax.jit(partial(HNetLM(config).apply, mutable="intermediates"))
    _, seen = apply({"params": load_llama_params(state, config)}, tokens)
    queries = seen["intermediates"]["stage0"]["encoder"]["run0"]["mixer"]["queries"][0][0, 0]

    def norm(x, scale):
        return scale * x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.5)

    x = norm(state["model.embed_tokens.weight"][tokens[0]], state["model.layers.0.input_layernorm.weight"])
    q = (x @ state["model.layers.0.self_attn.q_proj.weight"].T).reshape(5, 4, 8)
    expected = norm(q, state["model.layers.0.self_attn.q_norm.weight"])
    np.testing.assert_allclose(queries[0], expected[0], atol=SAME_COMPUTATION)  # position 0 is not rotated


@pytest.mark.parametrize("kind", KINDS)
def test_config_files_round_trip(kind):
    config = _config(**KINDS[kind])
    assert llama_config(to_llama_config(config)) == config


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_scalings_are_read_from_both_places_and_written(kind, place):
    base = {"rope_theta": 5e5}
    inside = base if place == "rope_parameters" else {}
    config = _config(**{place: SCALINGS[kind] | inside}, **({} if inside else base))
    attention = config.stages[0].stack.attention
    assert attention.rotary_base == 5e5 and attention.rotary_scaling.kind == kind
    assert llama_config(to_llama_config(config)) == config
    written = to_llama_config(config)
    assert written["rope_scaling"] == SCALINGS[kind] and written["rope_parameters"] == SCALINGS[kind] | base


def test_ntk_is_written_as_the_base_that_it_amounts_to():
    config = _config(rope_theta=1e4, rope_scaling={"rope_type": "ntk", "factor": 4.0})
    assert config.stages[0].stack.attention.rotary_scaling == RotaryScaling(kind="ntk", factor=4.0)
    written = to_llama_config(config)
    assert written["rope_scaling"] is None
    assert written["rope_theta"] == pytest.approx(1e4 * 4 ** (8 / 6))  # heads of 8 features


def test_a_window_counts_earlier_tokens_where_theirs_counts_the_token_too():
    assert _config(model_type="mistral", sliding_window=5).stages[0].stack.attention.window == 4
    assert _config(sliding_window=5).stages[0].stack.attention.window is None  # a llama reads none
    assert _config(model_type="qwen2", sliding_window=5).stages[0].stack.attention.window is None


def test_buffers_of_frequencies_and_a_head_that_is_tied_are_not_read():
    config = _config(tie_word_embeddings=True)
    state = _state(config)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4), "lm_head.weight": np.ones((29, 32))}
    jax.tree.map(np.testing.assert_array_equal, load_llama_params(state | extra, config),
                 load_llama_params(state, config))


def test_names_shapes_and_numbers_that_do_not_fit_are_refused_by_name():
    config = _config()
    state = _state(config)

    def refusal(changed):
        with pytest.raises(ValueError) as refused:
            load_llama_params(changed, config)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    missing = {name: value for name, value in state.items() if ".k_proj" not in name}
    text = refusal(missing | {"model.layers.0.self_attn.q_proj.bias": np.zeros(32), "extra": np.zeros(1)})
    assert ("2 names missing (model.layers.0.self_attn.k_proj.weight, model.layers.1.self_attn.k_proj.weight), "
            "2 names unexpected (extra, model.layers.0.self_attn.q_proj.bias); check model_type, ") in text
    name = "model.layers.1.mlp.down_proj.weight"
    assert f"{name} has shape (24, 32), and (32, 24) in this config; check model_type" in refusal(
        state | {name: state[name].T})
    broken = state[name].copy()
    broken[3, 4], broken[5, 6] = np.nan, np.inf
    assert f"{name} has 2 of 768 numbers that are NaN or infinite" in refusal(state | {name: broken})


@pytest.mark.parametrize(("fields", "message"), [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama, mistral, qwen2, qwen3"),
    ({"hidden_size": None}, "config.json lacks hidden_size"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu': there are only models with 'silu' here"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not one of default, linear"),
    ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' has no factor"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
     "1 of 2 layers have a sliding_window"),
])
def test_configs_of_other_models_are_refused(fields, message):
    with pytest.raises(ValueError) as refused:
        _config(**fields)
    assert message in str(refused.value)


@pytest.mark.parametrize(("change", "message"), [
    (lambda config, stage: dataclasses.replace(config, stages=one_stage_config().stages), "2 stages"),
    (lambda config, stage: dataclasses.replace(config, stages=(dataclasses.replace(stage, encoder="T1t1"),)),
     "stage0.encoder 'T1t1' has t"),
    (lambda config, stage: config.with_stack(attention=dataclasses.replace(stage.stack.attention, rotary_width=4)),
     "attention.rotary_width 4 is not the head width 8"),
])
def test_models_that_no_config_file_describes_are_refused(change, message):
    config = _config()
    changed = change(config, config.stages[0])
    for use in (to_llama_config, lambda config: to_llama_params({}, config),
                lambda config: load_llama_params({}, config)):
        with pytest.raises(ValueError) as refused:
            use(changed)
        assert message in str(refused.value)
