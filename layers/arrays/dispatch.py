"""What ops with kernels share: where the kernel of a platform is, and why it may not run."""
import functools
import importlib
import logging
from types import ModuleType

import jax

KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}  # what "auto" runs on a platform, if it can


def kernel_module(op: str, name: str) -> ModuleType:
    """The module `name` of the folder `op`; imported when asked for, as Pallas takes longer than all of layers."""
    return importlib.import_module(f"layers.{op}.{name}")


def spread_over() -> str | None:
    """Why a kernel cannot run under the mesh in use: the compiler splits none by itself; None if it need not."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {name: size for name, size in mesh.shape.items() if size > 1 and name not in mesh.manual_axes}
    return f"arrays may be spread over a mesh of {sizes}; call it inside jax.shard_map" if sizes else None


@functools.cache
def log_once(logger: logging.Logger, message: str, level: int = logging.INFO) -> None:
    logger.log(level, message)
