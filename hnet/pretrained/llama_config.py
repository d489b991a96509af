"""Config files of Llama and its relatives in the transformers library, and `HNetConfig`, both ways."""
import math
from collections.abc import Mapping
from typing import Any

from hnet.config import HNetConfig, StageConfig
from hnet.layout import has_feed_forward, mixer_of, parse_layout
from hnet.stack_config import AttentionConfig, StackConfig
from layers import RotaryScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM"}
# Fields that a plain model leaves at one value: our layers have no other.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
_DEFAULT_ROTARY_BASE, _DEFAULT_WINDOW = 10_000.0, 4096  # theirs, of what a file leaves out
_LENGTH = {"original_max_position_embeddings": "original_length"}
_SCALING_FIELDS = {  # theirs -> ours
    "linear": {}, "ntk": {},
    "llama3": {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor", **_LENGTH},
    "yarn": {
        "beta_fast": "fast_turns", "beta_slow": "slow_turns", "attention_factor": "attention_factor", **_LENGTH},
}


def llama_config(config_json: Mapping[str, Any], *, dtype: str = "float32") -> HNetConfig:
    """Reads a config.json of model_type llama, mistral, qwen2 or qwen3.

    Raises:
      ValueError: it is of another model, lacks a size, or asks for a layer that there is none of here.
    """
    kind = config_json.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(ARCHITECTURES)}")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [field for field in sizes if config_json.get(field) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    for field, only in _FIXED.items():
        if config_json.get(field, only) != only:
            raise ValueError(f"{field} {config_json[field]!r}: there are only models with {only!r} here")
    width, num_layers, num_heads = (
        config_json[field] for field in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    head_width = config_json.get("head_dim") or width // num_heads
    base, scaling = _rotary(config_json)
    attention = AttentionConfig(
        num_heads=num_heads, num_key_heads=config_json.get("num_key_value_heads") or num_heads,
        head_width=head_width, rotary_width=head_width, rotary_base=base, rotary_scaling=scaling,
        window=_window(config_json), bias=kind == "qwen2", qk_norm=kind == "qwen3")
    stack = StackConfig(
        width=width, attention=attention, feed_forward_width=config_json["intermediate_size"],
        norm_epsilon=float(config_json.get("rms_norm_eps", 1e-6)))
    return HNetConfig(
        stages=(StageConfig(stack=stack, encoder=f"T{num_layers}"),), vocab_size=config_json["vocab_size"],
        tie_embeddings=config_json.get("tie_word_embeddings", False), dtype=dtype,
        context_length=config_json.get("max_position_embeddings"))


def to_llama_config(config: HNetConfig) -> dict[str, Any]:
    """Writes a config.json: the inverse of `llama_config`, but for how to compute.

    Rotary positions are written as version 5 of the library has them, and as version 4 did. It has no word for the
    scaling "ntk", which is therefore written as the base that it amounts to.

    Raises:
      ValueError: `config` is not of such a model.
    """
    refuse_what_llama_lacks(config)
    stack = config.stages[0].stack
    attention = stack.attention
    kind = "qwen3" if attention.qk_norm else "qwen2" if attention.bias else "llama"
    if kind == "llama" and attention.window is not None:
        kind = "mistral"
    written = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": stack.width,
        "intermediate_size": stack.feed_forward_width,
        "num_hidden_layers": sum(count for _, count in parse_layout(config.stages[0].encoder)),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_key_heads or attention.num_heads,
        "head_dim": _head_width(stack),
        "hidden_act": "silu",
        "rms_norm_eps": stack.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
        **_write_rotary(attention, _head_width(stack)),
    }
    if config.context_length is not None:
        written["max_position_embeddings"] = config.context_length
    if attention.window is not None:  # theirs counts the token itself
        written["sliding_window"] = attention.window + 1
        if kind != "mistral":
            written |= {"use_sliding_window": True, "max_window_layers": 0}
    elif kind == "mistral":
        written["sliding_window"] = None
    return written


def refuse_what_llama_lacks(config: HNetConfig) -> None:
    """Raises ValueError for the first field of `config` that no config.json of this family has a word for."""
    if len(config.stages) != 1:
        raise ValueError(f"a Llama has one stage and no chunks, and this model {len(config.stages)} stages")
    (stage,) = config.stages
    other = sorted({name for name in stage.layers if mixer_of(name) != "t" or not has_feed_forward(name)})
    if other:
        raise ValueError(f"a Llama has layers T, attention with a feed-forward network, and stage0.encoder "
                         f"{stage.encoder!r} has {', '.join(other)}")
    attention, head_width = stage.stack.attention, _head_width(stage.stack)
    if attention.rotary_width != head_width:
        raise ValueError(f"a Llama rotates all of a head: attention.rotary_width {attention.rotary_width} is not "
                         f"the head width {head_width}")
    if attention.bias and attention.qk_norm:
        raise ValueError("no model of this family has both attention.bias and attention.qk_norm")


def _head_width(stack: StackConfig) -> int:
    return stack.attention.head_width or stack.width // stack.attention.num_heads


def _window(config_json: Mapping[str, Any]) -> int | None:
    """Earlier tokens that every layer sees; None = all."""
    window, num_layers = config_json.get("sliding_window", _DEFAULT_WINDOW), config_json["num_hidden_layers"]
    if config_json["model_type"] == "mistral":
        slides = [window is not None] * num_layers
    elif config_json["model_type"] == "llama" or not config_json.get("use_sliding_window", False):
        slides = [False] * num_layers
    else:
        slides = [layer >= config_json.get("max_window_layers", 28) for layer in range(num_layers)]
    if config_json.get("layer_types"):
        slides = [kind == "sliding_attention" for kind in config_json["layer_types"]]
    if any(slides) and not all(slides):
        raise ValueError(f"{sum(slides)} of {num_layers} layers have a sliding_window: there are only models here "
                         "with one window for all; see max_window_layers and layer_types")
    return window - 1 if all(slides) and window is not None else None  # theirs counts the token itself


def _rotary(config_json: Mapping[str, Any]) -> tuple[float, RotaryScaling | None]:
    """Base and scaling, from where version 4 of the library kept them or version 5 does."""
    rope = dict(config_json.get("rope_parameters") or config_json.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"rope_parameters {rope} differ between layers: there is one for all of them here")
    base = float(rope.get("rope_theta") or config_json.get("rope_theta") or _DEFAULT_ROTARY_BASE)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return base, None
    if kind not in _SCALING_FIELDS:
        raise ValueError(f"rope_type {kind!r} is not one of default, {', '.join(_SCALING_FIELDS)}")
    if rope.get("truncate", True) is not True:
        raise ValueError(f"rope_type {kind!r} with truncate {rope['truncate']!r}: there is only true here")
    if rope.get("factor") is None:
        raise ValueError(f"rope_type {kind!r} has no factor")
    fields = _SCALING_FIELDS[kind]
    found = {ours: (int if ours == "original_length" else float)(rope[theirs])
             for theirs, ours in fields.items() if rope.get(theirs) is not None}
    if "original_length" in fields.values() and config_json.get("max_position_embeddings"):
        found.setdefault("original_length", config_json["max_position_embeddings"])
    if kind == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim"):
        both = (_mscale(rope["factor"], rope[name]) for name in ("mscale", "mscale_all_dim"))
        found.setdefault("attention_factor", next(both) / next(both))
    return base, RotaryScaling(kind=kind, factor=float(rope["factor"]), **found)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def _write_rotary(attention: AttentionConfig, width: int) -> dict[str, Any]:
    base, scaling = attention.rotary_base, attention.rotary_scaling
    if scaling is not None and scaling.kind == "ntk":
        base, scaling = base * scaling.factor ** (width / max(width - 2, 1)), None
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        fields = {theirs: getattr(scaling, ours) for theirs, ours in _SCALING_FIELDS[scaling.kind].items()}
        rope = {"rope_type": scaling.kind, "factor": scaling.factor,
                **{theirs: value for theirs, value in fields.items() if value is not None}}
    return {"rope_theta": base, "rope_scaling": None if scaling is None else rope,
            "rope_parameters": {"rope_theta": base, **rope}}
