"""Parameters of the official release: its names, and where each tensor goes in ours."""
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from hnet.config import HNetConfig, StageConfig
from hnet.model import HNetLM

WHOLE = (0, None)


class Relabel(NamedTuple):
    """One of our tensors (or one layer of a stacked one) as rows of an official tensor."""

    official: str            # name in the release
    path: tuple[str, ...]    # path in our parameters
    layer: int = -1          # index on our leading layer axis; -1 = there is none
    rows: tuple[int, int | None] = WHOLE
    transpose: bool = True   # torch keeps matrices [out, in]; ours are [in, out]


def relabelling(config: HNetConfig) -> tuple[Relabel, ...]:
    """Lists where every parameter comes from. Stacked layers appear once per layer, in order."""
    entries = [Relabel("embeddings.weight", ("embedding",), transpose=False)]
    if not config.tie_embeddings:
        entries.append(Relabel("lm_head.weight", ("lm_head",)))
    official, path = "backbone", ("stage0",)
    for index, stage in enumerate(config.stages):
        if index > 0 and stage.width > config.stages[index - 1].width:
            entries.append(Relabel(f"{official}.pad_dimension", (*path, "pad_dimension")))
        if not stage.decoder:
            entries += _stack(stage, stage.encoder_runs, f"{official}.main_network", (*path, "encoder"))
            break
        for name, runs in (("encoder", stage.encoder_runs), ("decoder", stage.decoder_runs)):
            entries += _stack(stage, runs, f"{official}.{name}", (*path, name))
        entries += [
            Relabel(f"{official}.routing_module.q_proj_layer.weight", (*path, "router", "query", "kernel")),
            Relabel(f"{official}.routing_module.k_proj_layer.weight", (*path, "router", "key", "kernel")),
            Relabel(f"{official}.residual_proj.weight", (*path, "residual_proj", "kernel")),
            Relabel(f"{official}.residual_proj.bias", (*path, "residual_proj", "bias")),
        ]
        official, path = f"{official}.main_network", (*path, f"stage{index + 1}")
    return tuple(entries)


def load_official_params(state_dict: Mapping[str, Any], config: HNetConfig) -> dict[str, Any]:
    """Renames official parameters for `HNetLM(config).apply({"params": ...})`.

    A linear relabelling (transpose, split, stack), so gradients under official names pass through it too.

    Args:
      state_dict: official name -> numpy, jax or torch array. With tied embeddings `lm_head.weight` is not read.
    Returns:
      Nested dict of float32 jax arrays (float64 stays float64 where jax has it enabled).
    Raises:
      ValueError: a name is missing or unknown, or a shape does not fit `config`.
    """
    entries = relabelling(config)
    known = {entry.official for entry in entries}
    missing = sorted(known - set(state_dict))
    unknown = sorted(set(state_dict) - known - ({"lm_head.weight"} if config.tie_embeddings else set()))
    if missing or unknown:
        raise ValueError(
            f"the state dict does not fit this config: {len(missing)} names missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}; check arch_layout, d_model and tie_embeddings")

    tensors = {name: _as_jax(state_dict[name]) for name in known}
    shapes = flatten_dict(parameter_shapes(config))
    flat: dict[tuple[str, ...], list[jax.Array] | jax.Array] = {}
    for entry in entries:
        stacked = entry.layer >= 0
        shape = shapes[entry.path].shape[1:] if stacked else shapes[entry.path].shape
        piece = _to_ours(tensors[entry.official], entry, shape)
        if stacked:
            flat.setdefault(entry.path, []).append(piece)
        else:
            flat[entry.path] = piece
    return unflatten_dict({
        path: jnp.stack(piece) if isinstance(piece, list) else piece for path, piece in flat.items()})


def parameter_shapes(config: HNetConfig) -> dict[str, Any]:
    """The parameters of `HNetLM(config)` as ShapeDtypeStructs; nothing is allocated."""
    def init():
        return nn.unbox(HNetLM(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]

    return jax.eval_shape(init)


def _stack(
    stage: StageConfig, runs: tuple[tuple[str, int], ...], official: str, path: tuple[str, ...]
) -> Iterator[Relabel]:
    layer = 0
    for run, (letter, count) in enumerate(runs):
        for index in range(count):
            name, ours = f"{official}.layers.{layer}", (*path, f"run{run}")
            yield Relabel(f"{name}.norm1.weight", (*ours, "mixer_norm", "scale"), index)
            mixer = _mamba2(stage) if letter in "mM" else _ATTENTION
            for suffix, leaf, rows in mixer:
                yield Relabel(f"{name}.mixer.{suffix}", (*ours, "mixer", *leaf), index, rows)
            if letter in "MT":
                yield Relabel(f"{name}.norm2.weight", (*ours, "feed_forward_norm", "scale"), index)
                yield Relabel(f"{name}.mlp.fc1.weight", (*ours, "feed_forward", "value_gate", "kernel"), index)
                yield Relabel(f"{name}.mlp.fc2.weight", (*ours, "feed_forward", "out", "kernel"), index)
            layer += 1
    yield Relabel(f"{official}.rmsnorm.weight", (*path, "final_norm", "scale"))


_ATTENTION = (("Wqkv.weight", ("qkv", "kernel"), WHOLE), ("out_proj.weight", ("out", "kernel"), WHOLE))


def _mamba2(stage: StageConfig) -> tuple[tuple[str, tuple[str, ...], tuple[int, int | None]], ...]:
    inner, keys = stage.ssm_expand * stage.width, 2 * stage.ssm_state_size
    # in_proj holds z, x, (B, C), dt one after the other; the convolution runs over x, (B, C).
    return (
        ("in_proj.weight", ("z_proj", "kernel"), (0, inner)),
        ("in_proj.weight", ("x_proj", "kernel"), (inner, 2 * inner)),
        ("in_proj.weight", ("bc_proj", "kernel"), (2 * inner, 2 * inner + keys)),
        ("in_proj.weight", ("dt_proj", "kernel"), (2 * inner + keys, None)),
        ("conv1d.weight", ("conv_x", "kernel"), (0, inner)),
        ("conv1d.weight", ("conv_bc", "kernel"), (inner, None)),
        ("conv1d.bias", ("conv_x", "bias"), (0, inner)),
        ("conv1d.bias", ("conv_bc", "bias"), (inner, None)),
        ("dt_bias", ("dt_bias",), WHOLE),
        ("A_log", ("a_log",), WHOLE),
        ("D", ("skip",), WHOLE),
        ("norm.weight", ("norm_scale",), WHOLE),
        ("out_proj.weight", ("out", "kernel"), WHOLE),
    )


def _to_ours(tensor: jax.Array, entry: Relabel, shape: tuple[int, ...]) -> jax.Array:
    piece = tensor[slice(*entry.rows)]
    if piece.ndim == 3:
        piece = piece[:, 0]  # a depthwise kernel is [channels, 1, taps]
    if entry.transpose:
        piece = piece.T
    # A matrix becomes ours by splitting either its inputs or its outputs into heads, never both.
    keeps_an_end = piece.shape[:1] == shape[:1] or piece.shape[-1:] == shape[-1:]
    if piece.size != math.prod(shape) or not keeps_an_end:
        raise ValueError(
            f"{entry.official} has shape {tuple(tensor.shape)}, which does not fit {'/'.join(entry.path)} "
            f"of shape {shape} in this config; check d_model, d_intermediate, num_heads and ssm_cfg")
    return piece.reshape(shape)


def _as_jax(value: Any) -> jax.Array:
    if hasattr(value, "detach"):  # a torch tensor; numpy knows no bfloat16
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype.itemsize < 4 else value.numpy()
    value = jnp.asarray(value)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))
