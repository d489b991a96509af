"""Devices as a (data, model) grid, and which axis of what goes where. Nothing else knows the mesh."""
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.errors import UsageError

# Parameters name what an axis is; activations have names of their own: sharing one name between the two
# would make the compiler move the residual stream back and forth.
LOGICAL_AXIS_RULES = (
    ("activation_batch", "data"),
    ("activation_length", None),
    ("activation_embed", None),
    ("embed", None),
    ("vocab", "model"),
    ("mlp", "model"),
    ("inner", "model"),
    ("heads", "model"),
    ("head_width", None),
    ("state", None),
    ("conv", None),
    ("norm", None),
    ("layers", None),
)


def make_mesh(model_axis: int, devices: list[jax.Device] | None = None) -> Mesh:
    """Splits the devices into (data, model); `model_axis` of them share one copy of the parameters.

    Raises:
      UsageError: the devices do not divide.
    """
    devices = devices if devices is not None else jax.devices()
    if len(devices) % model_axis:
        raise UsageError(f"config.model_axis {model_axis} does not divide the {len(devices)} devices; "
                         f"use one of {[n for n in range(1, len(devices) + 1) if len(devices) % n == 0]}")
    # linen's logical constraints need Auto axes; make_mesh alone would give Explicit ones.
    return jax.make_mesh((len(devices) // model_axis, model_axis), ("data", "model"),
                         axis_types=(AxisType.Auto,) * 2, devices=devices)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """The one place that makes a mesh current: linen's logical constraints do nothing, silently, without it."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Places this process's rows of a global batch; only what a step reads."""
    names = [name for name in ("tokens", "segment_ids", "loss_mask", "num_bytes", "boundary_levels")
             if name in batch]
    return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in names}


def batch_placer(mesh: Mesh) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
    """Returns a function that places this process's rows of a global batch; its callers need not know the mesh."""
    return partial(put_batch, sharding=batch_sharding(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(boxed: Any, shapes: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter of these `shapes`, from the logical axes that linen's boxes carry.

    An axis that the model axis does not divide is replicated: it is small, or there would be padding to get wrong.
    """
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, LOGICAL_AXIS_RULES)

    def fit(sharding, shape):
        spec = [
            axis if axis is None or shape.shape[i] % mesh.shape[axis] == 0 else None
            for i, axis in enumerate(sharding.spec)
        ]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(fit, shardings, shapes)
