"""Parameters under the names of another code base, both ways: one entry for each tensor that they share.

A family of released weights is a function from a config to a tuple of `Relabel`; the rest is here.
"""
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hnet.config import HNetConfig
from hnet.model import HNetLM

WHOLE = (0, None)
# How a tensor of ours lies in theirs.
#   matrix  ours [in, out...], theirs [out, in]: torch keeps matrices the other way round
#   out     the same for ours [in..., out], which contracts heads
#   taps    ours [taps, channels], theirs [channels, 1, taps], of a depthwise convolution
#   vector  ours of any axes, theirs flat
#   same    as it is
Layout = Literal["matrix", "out", "taps", "vector", "same"]
Shapes = Mapping[tuple[str, ...], tuple[int, ...]]


class Relabel(NamedTuple):
    """One of our tensors, or one layer or part of it, as rows of a tensor of theirs."""

    theirs: str              # their name
    path: tuple[str, ...]    # path in our parameters
    layout: Layout = "matrix"
    layer: int = -1          # index on our leading layer axis; -1 = there is none
    rows: tuple[int, int | None] = WHOLE
    part: int = -1           # index on our first output axis, where ours stacks theirs; -1 = it does not


def load_relabelled(
    state_dict: Mapping[str, Any], entries: Sequence[Relabel], shapes: Shapes, *,
    ignored: Collection[str] = (), fields: str,
) -> dict[str, Any]:
    """Renames parameters of theirs into ours.

    A linear relabelling (transpose, split, stack), so gradients under their names pass through it too.

    Args:
      state_dict: their name -> numpy, jax or torch array. Each is read once, so that a mapping may fetch them
        from a file.
      entries: every parameter of ours; the parts of a tensor, of theirs or of ours, follow each other, in order.
      shapes: path in our parameters -> shape.
      ignored: names that may be there and are not read.
      fields: of their config, which a misfit may come from.
    Returns:
      Nested dict of float32 jax arrays (float64 stays float64 where jax has it enabled).
    Raises:
      ValueError: a name is missing or unexpected, a shape does not fit, or a number is NaN or infinite.
    """
    _check_names(state_dict, {entry.theirs for entry in entries}, ignored, fields)
    wanted = their_shapes(entries, shapes)
    pieces: dict[tuple[str, ...], list[jax.Array]] = {}
    name, tensor = "", None
    for entry in entries:
        if entry.theirs != name:
            name, tensor = entry.theirs, _as_jax(state_dict[entry.theirs], entry.theirs)
            if tensor.shape != wanted[name]:
                raise ValueError(f"{name} has shape {tensor.shape}, and {wanted[name]} in this config; "
                                 f"check {fields}")
        piece = _to_ours(tensor[slice(*entry.rows)], entry, _shape_of_part(shapes[entry.path], entry))
        pieces.setdefault(entry.path, []).append(piece)
    last = {entry.path: entry for entry in entries}  # of each tensor of ours
    return unflatten_dict({path: _assemble(pieces.pop(path), last[path]) for path in shapes})


def store_relabelled(params: Mapping[str, Any], entries: Sequence[Relabel]) -> dict[str, np.ndarray]:
    """The exact inverse of `load_relabelled`.

    Returns:
      Their name -> numpy array in the dtype it came in, some of them views.
    """
    flat, rows = flatten_dict(params), {}
    for entry in entries:
        ours = np.asarray(flat[entry.path])
        ours = ours[entry.layer] if entry.layer >= 0 else ours
        if entry.part >= 0:
            ours = np.take(ours, entry.part, axis=_part_axis(entry))
        rows.setdefault(entry.theirs, []).append(_to_theirs(ours, entry))
    return {name: found[0] if len(found) == 1 else np.concatenate(found) for name, found in rows.items()}


def their_shapes(entries: Sequence[Relabel], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Their name -> shape, for every tensor that `load_relabelled` reads."""
    found: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        rows, *others = _their_shape(_shape_of_part(shapes[entry.path], entry), entry.layout)
        found[entry.theirs] = (found.get(entry.theirs, (0,))[0] + rows, *others)
    return found


def parameter_shapes(config: HNetConfig) -> dict[str, Any]:
    """The parameters of `HNetLM(config)` as ShapeDtypeStructs; nothing is allocated."""
    def init():
        return nn.unbox(HNetLM(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]

    return jax.eval_shape(init)


@functools.cache
def our_shapes(config: HNetConfig) -> Shapes:
    """Path in the parameters of `HNetLM(config)` -> shape."""
    shapes = {path: shape.shape for path, shape in flatten_dict(parameter_shapes(config)).items()}
    return MappingProxyType(shapes)  # shared by all callers


def _check_names(found: Collection[str], known: set[str], ignored: Collection[str], fields: str) -> None:
    missing = sorted(known - set(found))
    unexpected = sorted(set(found) - known - set(ignored))
    if missing or unexpected:
        raise ValueError(f"the state dict does not fit this config: {_count(missing, 'missing')}, "
                         f"{_count(unexpected, 'unexpected')}; check {fields}")


def _count(names: list[str], adjective: str) -> str:
    if not names:
        return f"0 names {adjective}"
    return f"{len(names)} names {adjective} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _shape_of_part(shape: tuple[int, ...], entry: Relabel) -> tuple[int, ...]:
    """The shape of what one entry describes, without the axes of layers and of parts."""
    shape = shape[1:] if entry.layer >= 0 else shape
    axis = _part_axis(entry)
    return shape if entry.part < 0 else shape[:axis] + shape[axis + 1:]


def _part_axis(entry: Relabel) -> int:
    return 0 if entry.layout == "vector" else 1


def _their_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    if layout == "same":
        return shape
    if layout == "vector":
        return (math.prod(shape),)
    # A matrix of ours splits either its inputs or its outputs into heads, never both.
    split = len(shape) - 1 if layout == "out" else 1
    ins, outs = math.prod(shape[:split]), math.prod(shape[split:])
    return (outs, 1, ins) if layout == "taps" else (outs, ins)


def _to_ours(piece: jax.Array, entry: Relabel, shape: tuple[int, ...]) -> jax.Array:
    return (piece if entry.layout in ("vector", "same") else piece.T).reshape(shape)


def _to_theirs(ours: np.ndarray, entry: Relabel) -> np.ndarray:
    shape = _their_shape(ours.shape, entry.layout)
    return ours.reshape(shape) if entry.layout in ("vector", "same") else ours.reshape(shape[::-1]).T


def _assemble(pieces: list[jax.Array], last: Relabel) -> jax.Array:
    """Puts a tensor of ours together from its layers, and from the parts of each."""
    if last.part < 0:
        return jnp.stack(pieces) if last.layer >= 0 else pieces[0]
    stacked = jnp.stack(pieces)
    by_layer = stacked.reshape(-1, last.part + 1, *stacked.shape[1:])
    tensor = jnp.moveaxis(by_layer, 1, 1 + _part_axis(last))
    return tensor if last.layer >= 0 else tensor[0]


def _as_jax(value: Any, name: str) -> jax.Array:
    if hasattr(value, "detach"):  # a torch tensor; numpy knows no bfloat16
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype.itemsize < 4 else value.numpy()
    if not isinstance(value, jax.core.Tracer):
        num_bad = np.count_nonzero(~np.isfinite(value))
        if num_bad:
            raise ValueError(f"{name} has {num_bad:,} of {np.size(value):,} numbers that are NaN or infinite; the "
                             "file is damaged, or its training diverged")
    value = jnp.asarray(value)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))
