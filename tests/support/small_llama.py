"""A Llama of two layers with random weights, as a GGUF file and as the transformers library would store it."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hnet import llama_config
from hnet.pretrained.llama import llama_shapes
from tests.support.inputs import Draw
from tests.support.small_tokenizer import CHAT_TEMPLATE, SPECIAL, vocabulary

SIZES = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "rope_theta": 10_000.0, "tie_word_embeddings": True}
NAMES = {  # the transformers library's -> GGUF's, with the type of the file that the real model is in
    "model.embed_tokens.weight": ("token_embd.weight", "Q8_0"), "model.norm.weight": ("output_norm.weight", "F32"),
    "lm_head.weight": ("output.weight", "Q8_0"),
    "input_layernorm.weight": ("attn_norm.weight", "F32"),
    "post_attention_layernorm.weight": ("ffn_norm.weight", "F32"),
    "self_attn.q_norm.weight": ("attn_q_norm.weight", "F32"),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", "F32"),
    "self_attn.q_proj.bias": ("attn_q.bias", "F32"), "self_attn.k_proj.bias": ("attn_k.bias", "F32"),
    "self_attn.v_proj.bias": ("attn_v.bias", "F32"),
    "self_attn.q_proj.weight": ("attn_q.weight", "Q4_1"), "self_attn.k_proj.weight": ("attn_k.weight", "Q4_1"),
    "self_attn.v_proj.weight": ("attn_v.weight", "Q4_1"),
    "self_attn.o_proj.weight": ("attn_output.weight", "Q4_1"),
    "mlp.gate_proj.weight": ("ffn_gate.weight", "Q4_1"), "mlp.up_proj.weight": ("ffn_up.weight", "Q4_1"),
    "mlp.down_proj.weight": ("ffn_down.weight", "Q4_1")}


class SmallLlama(NamedTuple):
    """Weights as a file of these types gives them back, under the names of the transformers library."""

    config_json: dict[str, Any]
    state: dict[str, np.ndarray]


def config_json(**fields: Any) -> dict[str, Any]:
    """The config.json of a small Llama whose vocabulary is that of `small_tokenizer`."""
    return SIZES | {"vocab_size": len(vocabulary()[0])} | fields


def random_state(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights under the names of the transformers library, large enough for attention to have preferences."""
    draw = Draw(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "norm" in name:
            return np.asarray(1 + 0.1 * draw(*shape), np.float32)
        fan_in = shape[-1] if "proj.weight" in name else 4
        return np.asarray(draw(*shape), np.float32) * 1.5 / fan_in**0.5

    return {name: tensor(name, shape) for name, shape in llama_shapes(llama_config(config)).items()}


def write_gguf(
    path: Path, *, seed: int = 0, types: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None, pre: str = "smollm",
    state: Mapping[str, np.ndarray] | None = None, rope_factors: np.ndarray | None = None, **fields: Any,
) -> SmallLlama:
    """Writes a GGUF file with tokenizer, and returns what it must read as.

    Args:
      types: GGUF's name of a tensor -> its type, in place of those of NAMES; "blk.0.attn_q.weight": "F16".
      metadata: further entries by name.
      pre: the rule that cuts a text into words.
      state: weights in place of random ones.
      rope_factors: divisors of the rotary frequencies, as a tensor of their own.
      fields: of config.json, in place of those of SIZES.
    """
    import gguf

    config = config_json(**fields)
    writer = gguf.GGUFWriter(path, config["model_type"])
    _write_metadata(writer, config, pre)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in (metadata or {}).items():
        add[type(value)](name, value)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_factors, np.float32))
    # Only Llama's converter reorders rows, for rotary pairs of neighbours.
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    heads = heads if config["model_type"] == "llama" else {}
    read_back = {}
    for name, value in (state or random_state(config, seed)).items():
        stored, kind = gguf_name(name)
        num_heads = heads.get(stored.split(".")[-2])
        if num_heads:
            half = len(value) // num_heads // 2
            value = value.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(value.shape)
        kind = gguf.GGMLQuantizationType[(types or {}).get(stored, kind)]
        data = gguf.quants.quantize(value, kind)
        writer.add_tensor(stored, data, raw_dtype=kind)
        back = gguf.quants.dequantize(data, kind)
        if num_heads:  # the way back as the formula of the file's format has it
            back = back.reshape(num_heads, half, 2, -1).swapaxes(1, 2).reshape(back.shape)
        read_back[name] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return SmallLlama(config, read_back)


def gguf_name(name: str) -> tuple[str, str]:
    """Returns GGUF's name of a tensor and its type in the files that `write_gguf` makes."""
    if name in NAMES:
        return NAMES[name]
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    stored, kind = NAMES[part]
    return f"blk.{layer}.{stored}", kind


def _write_metadata(writer: Any, config: Mapping[str, Any], pre: str) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    tokens, merges, token_types = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types(token_types)
    writer.add_bos_token_id(SPECIAL.index("<|user|>"))
    writer.add_eos_token_id(SPECIAL.index("<|end|>"))
    writer.add_pad_token_id(SPECIAL.index("<|pad|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
