"""The official release's weights: its parameter names, and where each tensor goes in ours."""
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hnet.config import HNetConfig
from hnet.layout import has_feed_forward, mixer_of, parse_layout
from hnet.pretrained.relabel import (
    WHOLE,
    Layout,
    Relabel,
    load_relabelled,
    our_shapes,
    store_relabelled,
    their_shapes,
)
from hnet.pretrained.release_config import refuse_unofficial
from hnet.stack_config import StackConfig


def relabelling(config: HNetConfig) -> tuple[Relabel, ...]:
    """Lists where every parameter comes from. Stacked layers appear once per layer, in order."""
    entries = [Relabel("embeddings.weight", ("embedding",), "same")]
    if not config.tie_embeddings:
        entries.append(Relabel("lm_head.weight", ("lm_head",)))
    official, path = "backbone", ("stage0",)
    for index, stage in enumerate(config.stages):
        if index > 0 and stage.stack.width > config.stages[index - 1].stack.width:
            entries.append(Relabel(f"{official}.pad_dimension", (*path, "pad_dimension"), "vector"))
        if not stage.decoder:
            entries += _stack(stage.stack, stage.encoder, f"{official}.main_network", (*path, "encoder"))
            break
        for name, layout in (("encoder", stage.encoder), ("decoder", stage.decoder)):
            entries += _stack(stage.stack, layout, f"{official}.{name}", (*path, name))
        if stage.chunking.router == "learned":
            entries += [
                Relabel(f"{official}.routing_module.q_proj_layer.weight", (*path, "router", "query", "kernel")),
                Relabel(f"{official}.routing_module.k_proj_layer.weight", (*path, "router", "key", "kernel")),
            ]
        entries += [
            Relabel(f"{official}.residual_proj.weight", (*path, "residual_proj", "kernel")),
            Relabel(f"{official}.residual_proj.bias", (*path, "residual_proj", "bias"), "vector"),
        ]
        official, path = f"{official}.main_network", (*path, f"stage{index + 1}")
    return tuple(entries)


def load_official_params(state_dict: Mapping[str, Any], config: HNetConfig) -> dict[str, Any]:
    """Renames official parameters for `HNetLM(config).apply({"params": ...})`.

    A linear relabelling (transpose, split, stack), so gradients under official names pass through it too.

    Args:
      state_dict: official name -> numpy, jax or torch array. Each is read once, so that a mapping may fetch them
        from a file. With tied embeddings `lm_head.weight` is not read.
    Returns:
      Nested dict of float32 jax arrays (float64 stays float64 where jax has it enabled).
    Raises:
      ValueError: a name is missing or unknown, or a shape does not fit `config`.
    """
    return load_relabelled(
        state_dict, relabelling(config), our_shapes(config), fields="arch_layout, d_model, d_intermediate, "
        "num_heads, ssm_cfg and tie_embeddings", ignored={"lm_head.weight"} if config.tie_embeddings else set())


def to_official_params(params: Mapping[str, Any], config: HNetConfig) -> dict[str, np.ndarray]:
    """The exact inverse of `load_official_params`; with tied embeddings the head is there too, as in the release.

    Returns:
      Official name -> numpy array in the dtype it came in, some of them views.
    Raises:
      ValueError: `config` is of a model that the release does not have.
    """
    refuse_unofficial(config)
    official = store_relabelled(params, relabelling(config))
    if config.tie_embeddings:
        official["lm_head.weight"] = official["embeddings.weight"]
    return official


def official_shapes(config: HNetConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape, for every tensor that `load_official_params` reads."""
    return their_shapes(relabelling(config), our_shapes(config))


def _stack(stack: StackConfig, layout: str, official: str, path: tuple[str, ...]) -> Iterator[Relabel]:
    layer = 0
    for run, (kind, count) in enumerate(parse_layout(layout)):
        for index in range(count):
            name, ours = f"{official}.layers.{layer}", (*path, f"run{run}")
            yield Relabel(f"{name}.norm1.weight", (*ours, "mixer_norm", "scale"), "vector", index)
            mixer = _mamba2(stack) if mixer_of(kind) == "m" else _ATTENTION
            for suffix, leaf, layout_of, rows in mixer:
                yield Relabel(f"{name}.mixer.{suffix}", (*ours, "mixer", *leaf), layout_of, index, rows)
            if has_feed_forward(kind):
                feed_forward = (*ours, "feed_forward")
                yield Relabel(f"{name}.norm2.weight", (*ours, "feed_forward_norm", "scale"), "vector", index)
                yield Relabel(f"{name}.mlp.fc1.weight", (*feed_forward, "value_gate", "kernel"), "matrix", index)
                yield Relabel(f"{name}.mlp.fc2.weight", (*feed_forward, "out", "kernel"), "out", index)
            layer += 1
    yield Relabel(f"{official}.rmsnorm.weight", (*path, "final_norm", "scale"), "vector")


Tensor = tuple[str, tuple[str, ...], Layout, tuple[int, int | None]]  # name, path, how it lies, rows
_ATTENTION: tuple[Tensor, ...] = (
    ("Wqkv.weight", ("qkv", "kernel"), "matrix", WHOLE),
    ("out_proj.weight", ("out", "kernel"), "out", WHOLE),
)


def _mamba2(stack: StackConfig) -> tuple[Tensor, ...]:
    inner, keys = stack.recurrence.expand * stack.width, 2 * stack.recurrence.state_size
    # in_proj holds z, x, (B, C), dt one after the other; the convolution runs over x, (B, C).
    return (
        ("in_proj.weight", ("z_proj", "kernel"), "matrix", (0, inner)),
        ("in_proj.weight", ("x_proj", "kernel"), "matrix", (inner, 2 * inner)),
        ("in_proj.weight", ("bc_proj", "kernel"), "matrix", (2 * inner, 2 * inner + keys)),
        ("in_proj.weight", ("dt_proj", "kernel"), "matrix", (2 * inner + keys, None)),
        ("conv1d.weight", ("conv_x", "kernel"), "taps", (0, inner)),
        ("conv1d.weight", ("conv_bc", "kernel"), "taps", (inner, None)),
        ("conv1d.bias", ("conv_x", "bias"), "vector", (0, inner)),
        ("conv1d.bias", ("conv_bc", "bias"), "vector", (inner, None)),
        ("dt_bias", ("dt_bias",), "vector", WHOLE),
        ("A_log", ("a_log",), "vector", WHOLE),
        ("D", ("skip",), "vector", WHOLE),
        ("norm.weight", ("norm_scale",), "vector", WHOLE),
        ("out_proj.weight", ("out", "kernel"), "out", WHOLE),
    )
