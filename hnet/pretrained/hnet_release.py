"""The official release's weights: its parameter names, and where each tensor goes in ours."""
import functools
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hnet.config import HNetConfig
from hnet.layout import has_feed_forward, mixer_of, parse_layout
from hnet.model import HNetLM
from hnet.pretrained.release_config import refuse_unofficial
from hnet.stack_config import StackConfig

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
        if index > 0 and stage.stack.width > config.stages[index - 1].stack.width:
            entries.append(Relabel(f"{official}.pad_dimension", (*path, "pad_dimension")))
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
            Relabel(f"{official}.residual_proj.bias", (*path, "residual_proj", "bias")),
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
    entries = relabelling(config)
    known = {entry.official for entry in entries}
    missing = sorted(known - set(state_dict))
    unknown = sorted(set(state_dict) - known - ({"lm_head.weight"} if config.tie_embeddings else set()))
    if missing or unknown:
        raise ValueError(
            f"the state dict does not fit this config: {len(missing)} names missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}; check arch_layout, d_model and tie_embeddings")

    shapes, wanted = _our_shapes(config), official_shapes(config)
    pieces: dict[tuple[str, ...], list[jax.Array]] = {}
    name, tensor = "", None
    for entry in entries:
        if entry.official != name:  # the parts of one tensor follow each other
            name, tensor = entry.official, _as_jax(state_dict[entry.official])
            if tensor.shape != wanted[name]:
                raise ValueError(
                    f"{name} has shape {tensor.shape}, and {wanted[name]} in this config; "
                    "check d_model, d_intermediate, num_heads and ssm_cfg")
        shape = shapes[entry.path]
        pieces.setdefault(entry.path, []).append(_to_ours(tensor, entry, shape[1:] if entry.layer >= 0 else shape))
    flat = {}
    for path, shape in shapes.items():
        found = pieces.pop(path)
        flat[path] = jnp.stack(found) if len(shape) > found[0].ndim else found[0]
    return unflatten_dict(flat)


def to_official_params(params: Mapping[str, Any], config: HNetConfig) -> dict[str, np.ndarray]:
    """The exact inverse of `load_official_params`; with tied embeddings the head is there too, as in the release.

    Returns:
      Official name -> numpy array in the dtype it came in, some of them views.
    Raises:
      ValueError: `config` is of a model that the release does not have.
    """
    refuse_unofficial(config)
    flat, parts = flatten_dict(params), {}
    for entry in relabelling(config):
        ours = np.asarray(flat[entry.path])
        parts.setdefault(entry.official, []).append(
            _to_theirs(ours[entry.layer] if entry.layer >= 0 else ours, entry))
    official = {name: part[0] if len(part) == 1 else np.concatenate(part) for name, part in parts.items()}
    if config.tie_embeddings:
        official["lm_head.weight"] = official["embeddings.weight"]
    return official


def official_shapes(config: HNetConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape, for every tensor that `load_official_params` reads."""
    ours, shapes = _our_shapes(config), {}
    for entry in relabelling(config):
        shape = ours[entry.path]
        rows, *others = _official_shape(shape[1:] if entry.layer >= 0 else shape, entry)
        shapes[entry.official] = (shapes.get(entry.official, (0,))[0] + rows, *others)
    return shapes


def parameter_shapes(config: HNetConfig) -> dict[str, Any]:
    """The parameters of `HNetLM(config)` as ShapeDtypeStructs; nothing is allocated."""
    def init():
        return nn.unbox(HNetLM(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]

    return jax.eval_shape(init)


@functools.cache
def _our_shapes(config: HNetConfig) -> Mapping[tuple[str, ...], tuple[int, ...]]:
    shapes = {path: shape.shape for path, shape in flatten_dict(parameter_shapes(config)).items()}
    return MappingProxyType(shapes)  # shared by all callers


def _stack(stack: StackConfig, layout: str, official: str, path: tuple[str, ...]) -> Iterator[Relabel]:
    layer = 0
    for run, (kind, count) in enumerate(parse_layout(layout)):
        for index in range(count):
            name, ours = f"{official}.layers.{layer}", (*path, f"run{run}")
            yield Relabel(f"{name}.norm1.weight", (*ours, "mixer_norm", "scale"), index)
            mixer = _mamba2(stack) if mixer_of(kind) == "m" else _ATTENTION
            for suffix, leaf, rows in mixer:
                yield Relabel(f"{name}.mixer.{suffix}", (*ours, "mixer", *leaf), index, rows)
            if has_feed_forward(kind):
                yield Relabel(f"{name}.norm2.weight", (*ours, "feed_forward_norm", "scale"), index)
                yield Relabel(f"{name}.mlp.fc1.weight", (*ours, "feed_forward", "value_gate", "kernel"), index)
                yield Relabel(f"{name}.mlp.fc2.weight", (*ours, "feed_forward", "out", "kernel"), index)
            layer += 1
    yield Relabel(f"{official}.rmsnorm.weight", (*path, "final_norm", "scale"))


_ATTENTION = (("Wqkv.weight", ("qkv", "kernel"), WHOLE), ("out_proj.weight", ("out", "kernel"), WHOLE))


def _mamba2(stack: StackConfig) -> tuple[tuple[str, tuple[str, ...], tuple[int, int | None]], ...]:
    inner, keys = stack.recurrence.expand * stack.width, 2 * stack.recurrence.state_size
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


def _official_shape(shape: tuple[int, ...], entry: Relabel) -> tuple[int, ...]:
    """The shape that a tensor of ours (one layer of it) has in the release, or that its rows of one have."""
    if len(shape) == 1 or not entry.transpose:
        return shape
    # A matrix of ours splits either its inputs (`out`) or its outputs into heads, never both.
    holder = entry.path[-2:][0]
    split = len(shape) - 1 if holder == "out" else 1
    ins, outs = math.prod(shape[:split]), math.prod(shape[split:])
    return (outs, 1, ins) if holder.startswith("conv") else (outs, ins)  # depthwise: [channels, 1, taps]


def _to_ours(tensor: jax.Array, entry: Relabel, shape: tuple[int, ...]) -> jax.Array:
    piece = tensor[slice(*entry.rows)]
    return (piece.T if entry.transpose else piece).reshape(shape)


def _to_theirs(ours: np.ndarray, entry: Relabel) -> np.ndarray:
    shape = _official_shape(ours.shape, entry)
    return ours.reshape(shape[::-1]).T if entry.transpose else ours


def _as_jax(value: Any) -> jax.Array:
    if hasattr(value, "detach"):  # a torch tensor; numpy knows no bfloat16
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype.itemsize < 4 else value.numpy()
    value = jnp.asarray(value)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))
