"""GGUF files of Llama, Qwen2 and Qwen3, as the transformers library would have stored the same models."""
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.errors import UsageError
from experiments.weights.tensor_files import TensorFile, import_package, reading

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile(NamedTuple):
    """An open GGUF file.

    Attributes:
      config_json: the fields that config.json would have.
      tensors: name in the transformers library -> float32 array [out, in], dequantised when it is asked for; the
        rows of queries and keys are in the order of a rotary embedding in halves.
      stored: name in the file -> float32 array, rows as they are in the file.
      metadata: all that the file says about itself.
    """

    config_json: dict[str, Any]
    tensors: Mapping[str, Any]
    stored: Mapping[str, Any]
    metadata: Mapping[str, Any]


def open_gguf(path: Path) -> GGUFFile:
    """Opens a GGUF file; tensors come into memory one by one.

    Raises:
      UsageError: there is no such file, it is damaged or cut off, of another architecture, or quantised in a way
        that the package `gguf` cannot undo.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    gguf = import_package("gguf", path)
    with reading(path):
        _check_begin(path)
        try:
            reader = gguf.GGUFReader(path)
        except (IndexError, ValueError) as error:
            if "GGMLQuantizationType" in str(error):
                raise UsageError(f"{path} has a type of tensors that the package gguf does not know "
                                 f"({_reason(error)}); take a file of another quantisation") from error
            raise UsageError(f"{path} cannot be read as GGUF ({_reason(error)}); it may be cut off: it has "
                             f"{path.stat().st_size:,} bytes") from error
        _check_types(path, gguf, reader)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        by_name = {tensor.name: tensor for tensor in reader.tensors}
        stored = TensorFile(path, {name: name for name in by_name}, lambda name: np.ascontiguousarray(
            gguf.quants.dequantize(by_name[name].data, by_name[name].tensor_type), np.float32))
        shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in by_name.items()}
        config = _config(path, metadata, shapes) | {"rope_scaling": _scaling(path, metadata, stored)}
        return GGUFFile(config, _renamed(path, config, stored), stored, metadata)


def half_split_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders the rows of a projection from rotary pairs (2j, 2j + 1) to pairs (j, j + half) within each head.

    Args:
      rows: [out, ...], a matrix or a bias.
    """
    heads = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def _check_begin(path: Path) -> None:
    with path.open("rb") as file:
        begin = file.read(4)
    if begin != b"GGUF":
        raise UsageError(f"{path} is no GGUF file: it begins with {begin!r}, not with b'GGUF'")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _check_types(path: Path, gguf: Any, reader: Any) -> None:
    for tensor in reader.tensors:
        try:
            # One block, to learn whether there is a way back from this type.
            gguf.quants.dequantize(tensor.data[(0,) * (tensor.data.ndim - 1)], tensor.tensor_type)
        except NotImplementedError as error:
            raise UsageError(f"{path}: {tensor.name} is of type {tensor.tensor_type.name}, which the package gguf "
                             "cannot turn into numbers; take a file of another quantisation") from error


def _config(
    path: Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UsageError(f"{path} is of architecture {kind!r}; those read here are {', '.join(ARCHITECTURES)}")

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{kind}.{key}", default)

    for key, word in (("expert_count", "experts per layer"), ("attention.sliding_window", "tokens in a window")):
        if get(key):
            raise UsageError(f"{path} has {get(key)} {word}; those read here have none")
    num_heads = get("attention.head_count")
    if isinstance(num_heads, list) or isinstance(get("attention.head_count_kv"), list):
        raise UsageError(f"{path} has layers that differ in their heads; those read here have equal layers")
    if not num_heads or not get("embedding_length"):
        raise UsageError(f"{path} lacks {kind}.attention.head_count or {kind}.embedding_length")
    head_width = get("attention.key_length") or get("embedding_length") // num_heads
    if (get("rope.dimension_count") or head_width) != head_width:
        raise UsageError(f"{path} rotates {get('rope.dimension_count')} features of heads of {head_width}; those "
                         "read here rotate all")
    if "token_embd.weight" not in shapes:
        raise UsageError(f"{path} has no token_embd.weight, so that its vocabulary has no size")
    return {
        "model_type": kind,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": get("attention.head_count_kv") or num_heads,
        "head_dim": head_width,
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon", 1e-5)),
        "max_position_embeddings": get("context_length"),
        "rope_theta": _decimal(get("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in shapes,
    }


def _decimal(value: float) -> float:
    """Returns the number that was meant: GGUF keeps 1e-5 in float32."""
    return float(str(np.float32(value)))


def _scaling(path: Path, metadata: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any] | None:
    rope = f"{metadata['general.architecture']}.rope"

    def get(key: str) -> Any:
        return metadata.get(f"{rope}.scaling.{key}")

    if _ROPE_FACTORS in stored:
        return _llama3_scaling(path, stored[_ROPE_FACTORS], metadata.get(f"{rope}.freq_base", 10_000.0))
    name = get("type") or "none"
    if name == "none":
        return None
    if name not in ("linear", "yarn"):
        raise UsageError(f"{path} scales rotary positions by {name!r}; those read here are linear and yarn")
    scaling = {"rope_type": name, "factor": _decimal(get("factor") or 1.0)}
    fields = {"original_context_length": "original_max_position_embeddings", "yarn_beta_fast": "beta_fast",
              "yarn_beta_slow": "beta_slow"} if name == "yarn" else {}
    return scaling | {theirs: get(key) for key, theirs in fields.items() if get(key) is not None}


def _llama3_scaling(path: Path, factors: np.ndarray, base: float) -> dict[str, Any]:
    """Finds the rule of Llama 3 that made these divisors of frequencies; the file leaves out its settings."""
    largest = _decimal(factors.max())
    turns = base ** (-np.arange(len(factors)) / len(factors)) * 8192 / (2 * math.pi)
    kept = np.clip((turns - 1) / 3, 0, 1)
    if not np.allclose(1 / factors, kept + (1 - kept) / largest, rtol=1e-4):
        raise UsageError(f"{path}: {_ROPE_FACTORS} is not the rule of Llama 3 with its usual settings; import the "
                         "model's .safetensors with its config.json")
    return {"rope_type": "llama3", "factor": largest, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}


def _renamed(path: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> TensorFile:
    names = {_their_name(name): name for name in stored if name != _ROPE_FACTORS}
    # Only Llama's converter writes rows for neighbouring pairs.
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    heads = heads if config["model_type"] == "llama" else {}

    def read(name: str) -> np.ndarray:
        part = name.split(".")[-2]
        return half_split_rows(stored[name], heads[part]) if part in heads else stored[name]

    return TensorFile(path, names, read)


def _their_name(name: str) -> str:
    """Returns the name in the transformers library; one without a counterpart stays, and is then unexpected."""
    *begin, part, leaf = name.split(".")
    if not begin and part in _OUTSIDE:
        return f"{_OUTSIDE[part]}.{leaf}"
    if len(begin) == 2 and begin[0] == "blk" and part in _IN_BLOCK:
        return f"model.layers.{begin[1]}.{_IN_BLOCK[part]}.{leaf}"
    return name
