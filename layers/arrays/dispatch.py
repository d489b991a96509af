"""Choice of an implementation: the kernel of a platform where it can run, and otherwise one that runs anywhere."""
import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import jax

KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}  # the module, and implementation=, of each platform's kernel
NO_REASONS: Mapping[str, str | None] = MappingProxyType({})
logger = logging.getLogger(__name__)


def by_platform(
    op: str, run: Mapping[str, Callable[..., Any]], *operands: Any, reasons: Mapping[str, str | None] = NO_REASONS,
    fallback: str = "default", implementation: str = "auto",
) -> Any:
    """Runs the implementation of an op for the platform that the program is lowered for.

    A kernel that has a reason not to run is left out, and its platform takes run["default"]: this is logged once.
    The compiler cannot split a kernel over devices, so a mesh of several devices, in use or that of an operand, is
    a reason for all kernels; inside `jax.shard_map` it is none.

    Args:
      op: its name, for the log.
      run: a function of the operands per platform: "tpu" and "cuda" are kernels, "cpu" is optional, and "default"
        serves all other platforms.
      operands: pytrees of arrays, each given to every function.
      reasons: per platform why its kernel cannot run this call; None, or nothing, if it can.
      fallback: the name of run["default"], for the log.
      implementation: "auto", or the name of a kernel in `KERNELS`, which alone is then run.
    Raises:
      NotImplementedError: the kernel named by `implementation` has a reason not to run.
    """
    over_devices = reason_of_mesh(operands)
    if implementation != "auto":
        platform = next(platform for platform, name in KERNELS.items() if name == implementation)
        reason = over_devices or reasons.get(platform)
        if reason is not None:
            raise NotImplementedError(f'implementation="{implementation}": {reason}')
        return run[platform](*operands)
    chosen = dict(run)
    for platform in [platform for platform in KERNELS if platform in run]:
        reason = over_devices or reasons.get(platform)
        if reason is not None:
            del chosen[platform]
            log_once(logger, f"{op} runs as {fallback} on {platform}: {reason}")
    return jax.lax.platform_dependent(*operands, **chosen)


def kernel_modules(folder: str, implementation: str = "auto") -> dict[str, ModuleType]:
    """Imports the kernels of an op by platform: all of them for "auto", or only the one named.

    They are imported here, when they are needed, because Pallas takes longer to import than all of layers.

    Args:
      folder: below layers, with dots: "recurrences.matrix".
    """
    return {platform: importlib.import_module(f"layers.{folder}.{name}") for platform, name in KERNELS.items()
            if implementation in ("auto", name)}


def reason_of_mesh(operands: Any = ()) -> str | None:
    """Returns why the mesh in use, or that of an operand, rules out kernels; None if it does not."""
    meshes = {jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in jax.tree.leaves(operands))}
    sizes = {name: size for mesh in meshes for name, size in mesh.shape.items()
             if size > 1 and name not in mesh.manual_axes}
    return f"arrays may be spread over a mesh of {sizes}; call it inside jax.shard_map" if sizes else None


@functools.cache
def log_once(logger: logging.Logger, message: str, level: int = logging.INFO) -> None:
    """Logs a message unless the same logger had it before."""
    logger.log(level, message)
