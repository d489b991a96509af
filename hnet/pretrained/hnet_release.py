"""The official release's format: its parameter names, where each tensor goes in ours, and its config file."""
import functools
import json
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hnet.config import HNetConfig, StageConfig, has_feed_forward, mixer_of
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
        if stage.router == "learned":
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
    _refuse_unofficial(config)
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


def to_official_json(config: HNetConfig) -> str:
    """Writes the release's config file: the inverse of `HNetConfig.from_official_json`, but for how to compute.

    The release has no words for capacity, overflow, dtype and the like, which change no parameter. Its chunk_size
    of Mamba-2's scan changes no result either; it is always 256 here.

    Raises:
      ValueError: `config` is of a model that the release does not have.
    """
    _refuse_unofficial(config)
    stages = config.stages
    layout: list[Any] = [stages[-1].encoder]
    for stage in reversed(stages[:-1]):
        layout = [stage.encoder, layout, stage.decoder]

    def each(field: str) -> list[int]:
        return [getattr(stage, field) for stage in stages]

    def shared(field: str) -> int | list[int]:
        values = each(field)
        return values[0] if len(set(values)) == 1 else values

    return json.dumps({
        "arch_layout": layout,
        "d_model": each("width"),
        "d_intermediate": [stage.feed_forward_width if _has_feed_forward(stage) else 0 for stage in stages],
        "vocab_size": config.vocab_size,
        "ssm_cfg": {
            "chunk_size": 256, "d_conv": shared("ssm_conv_taps"), "d_state": shared("ssm_state_size"),
            "expand": shared("ssm_expand")},
        "attn_cfg": {
            "num_heads": each("num_heads"), "rotary_emb_dim": each("rotary_width"), "window_size": each("window")},
        "tie_embeddings": config.tie_embeddings,
    }, indent=2)


def parameter_shapes(config: HNetConfig) -> dict[str, Any]:
    """The parameters of `HNetLM(config)` as ShapeDtypeStructs; nothing is allocated."""
    def init():
        return nn.unbox(HNetLM(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]

    return jax.eval_shape(init)


@functools.cache
def _our_shapes(config: HNetConfig) -> Mapping[tuple[str, ...], tuple[int, ...]]:
    shapes = {path: shape.shape for path, shape in flatten_dict(parameter_shapes(config)).items()}
    return MappingProxyType(shapes)  # shared by all callers


def _stack(
    stage: StageConfig, runs: tuple[tuple[str, int], ...], official: str, path: tuple[str, ...]
) -> Iterator[Relabel]:
    layer = 0
    for run, (kind, count) in enumerate(runs):
        for index in range(count):
            name, ours = f"{official}.layers.{layer}", (*path, f"run{run}")
            yield Relabel(f"{name}.norm1.weight", (*ours, "mixer_norm", "scale"), index)
            mixer = _mamba2(stage) if mixer_of(kind) == "m" else _ATTENTION
            for suffix, leaf, rows in mixer:
                yield Relabel(f"{name}.mixer.{suffix}", (*ours, "mixer", *leaf), index, rows)
            if has_feed_forward(kind):
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


def _has_feed_forward(stage: StageConfig) -> bool:
    return any(has_feed_forward(name) for name, _ in stage.encoder_runs + stage.decoder_runs)


def _refuse_unofficial(config: HNetConfig) -> None:
    """Raises ValueError for the first thing in `config` that is not in the release."""
    for index, stage in enumerate(config.stages):
        fixed = {"router": "learned", "downsampler": "first", "upsampler": "smooth"} if stage.decoder else {}
        mixers = {mixer_of(name) for name, _ in stage.encoder_runs + stage.decoder_runs}
        if mixers - {"m", "t"}:
            raise ValueError(f"the official format has no word for the mixer {min(mixers - {'m', 't'})!r} of "
                             f"stage{index}: its layers are Mamba-2 (m) and attention (t)")
        if "m" in mixers:
            fixed["ssm_head_width"] = 64
        for field, only in fixed.items():
            if getattr(stage, field) != only:
                raise ValueError(f"the official format has no word for stage{index}.{field} "
                                 f"{getattr(stage, field)!r}: it is always {only!r} there")
        # What it rounds up, it has no word for; and its smoothing kernel takes heads of 32.
        multiples = {"feed_forward_width": 128} if _has_feed_forward(stage) else {}
        multiples |= {"width": 32} if stage.decoder else {}
        for field, multiple in multiples.items():
            if getattr(stage, field) % multiple:
                raise ValueError(f"the official format needs a stage{index}.{field} that is a multiple of "
                                 f"{multiple}, not {getattr(stage, field)}")


def _as_jax(value: Any) -> jax.Array:
    if hasattr(value, "detach"):  # a torch tensor; numpy knows no bfloat16
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype.itemsize < 4 else value.numpy()
    value = jnp.asarray(value)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))
