"""Llama's weights, and those of its relatives, under the names of the transformers library."""
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hnet.config import HNetConfig
from hnet.layout import parse_layout
from hnet.pretrained.llama_config import refuse_what_llama_lacks
from hnet.pretrained.relabel import Relabel, load_relabelled, our_shapes, store_relabelled, their_shapes
from hnet.stack_config import AttentionConfig


def llama_relabelling(config: HNetConfig) -> tuple[Relabel, ...]:
    """Lists where every parameter comes from, layer by layer."""
    (stage,) = config.stages
    entries = [Relabel("model.embed_tokens.weight", ("embedding",), "same")]
    if not config.tie_embeddings:
        entries.append(Relabel("lm_head.weight", ("lm_head",)))
    layer, path = 0, ("stage0", "encoder")
    for run, (_, count) in enumerate(parse_layout(stage.encoder)):
        for index in range(count):
            entries += _block(stage.stack.attention, f"model.layers.{layer}", (*path, f"run{run}"), index)
            layer += 1
    return (*entries, Relabel("model.norm.weight", (*path, "final_norm", "scale"), "vector"))


def load_llama_params(state_dict: Mapping[str, Any], config: HNetConfig) -> dict[str, Any]:
    """Renames the parameters of a LlamaForCausalLM, or of a relative, for `HNetLM(config).apply({"params": ...})`.

    Queries and keys rotate in halves, as in the transformers library. Files of other programs that pair neighbours
    need their rows permuted first, which no check here can notice.

    Args:
      state_dict: name -> numpy, jax or torch array. Each is read once. Buffers of rotary frequencies, and with
        tied embeddings the head, are not read.
      config: from `llama_config`.
    Returns:
      Nested dict of float32 jax arrays (float64 stays float64 where jax has it enabled).
    Raises:
      ValueError: a name is missing or unexpected, a shape does not fit `config`, or a number is NaN or infinite.
    """
    refuse_what_llama_lacks(config)
    ignored = {name for name in state_dict if name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        ignored.add("lm_head.weight")
    return load_relabelled(
        state_dict, llama_relabelling(config), our_shapes(config), ignored=ignored,
        fields="model_type, num_hidden_layers, hidden_size, intermediate_size, num_attention_heads, "
        "num_key_value_heads, head_dim, vocab_size and tie_word_embeddings")


def to_llama_params(params: Mapping[str, Any], config: HNetConfig) -> dict[str, np.ndarray]:
    """The exact inverse of `load_llama_params`, without a head that is tied.

    Returns:
      Name -> numpy array in the dtype it came in, some of them views.
    Raises:
      ValueError: `config` is not of such a model.
    """
    refuse_what_llama_lacks(config)
    entries = llama_relabelling(config)
    stored = store_relabelled(params, entries)
    return {name: stored[name] for name in dict.fromkeys(entry.theirs for entry in entries)}


def llama_shapes(config: HNetConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape, for every tensor that `load_llama_params` reads."""
    return their_shapes(llama_relabelling(config), our_shapes(config))


def _block(attention: AttentionConfig, theirs: str, path: tuple[str, ...], index: int) -> Iterator[Relabel]:
    mixer, feed_forward, norm = (*path, "mixer"), (*path, "feed_forward"), (*path, "feed_forward_norm", "scale")
    yield Relabel(f"{theirs}.input_layernorm.weight", (*path, "mixer_norm", "scale"), "vector", index)
    # Attention keeps one kernel where queries and keys have as many heads, and two otherwise.
    if attention.num_key_heads in (0, attention.num_heads):
        places = {"q_proj": ("qkv", 0), "k_proj": ("qkv", 1), "v_proj": ("qkv", 2)}
    else:
        places = {"q_proj": ("q", -1), "k_proj": ("kv", 0), "v_proj": ("kv", 1)}
    for name, (ours, part) in places.items():
        yield Relabel(
            f"{theirs}.self_attn.{name}.weight", (*mixer, ours, "kernel"), "matrix", index, part=part)
    if attention.bias:
        for name, (ours, part) in places.items():
            yield Relabel(f"{theirs}.self_attn.{name}.bias", (*mixer, f"{ours}_bias"), "vector", index, part=part)
    if attention.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield Relabel(f"{theirs}.self_attn.{name}.weight", (*mixer, f"{name}_scale"), "vector", index)
    yield Relabel(f"{theirs}.self_attn.o_proj.weight", (*mixer, "out", "kernel"), "out", index)
    yield Relabel(f"{theirs}.post_attention_layernorm.weight", norm, "vector", index)
    for part, name in enumerate(("up_proj", "gate_proj")):
        yield Relabel(
            f"{theirs}.mlp.{name}.weight", (*feed_forward, "value_gate", "kernel"), "matrix", index, part=part)
    yield Relabel(f"{theirs}.mlp.down_proj.weight", (*feed_forward, "out", "kernel"), "out", index)
