"""Writers of tensors by name: .pt, .safetensors and .npz files."""
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.errors import UsageError
from experiments.weights.tensor_files import import_package

Write = Callable[[Path, dict[str, np.ndarray]], None]


def tensor_writer(out: Path, dtype: str) -> Write:
    """Returns a writer for files of this kind, after all that could be wrong with the name was looked at.

    Raises:
      UsageError: `out` is there already, has no directory, or is of a kind that holds no tensors of `dtype`.
    """
    refuse_present(out)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: there is no directory {out.absolute().parent}; make it first")
    if out.suffix == ".pt":
        return partial(_write_torch, import_package("torch", out))
    if out.suffix == ".safetensors":
        save_file = import_package("safetensors.numpy", out).save_file
        # The transformers library reads no file that does not say this of itself.
        return lambda path, tensors: save_file(tensors, path, metadata={"format": "pt"})
    if out.suffix != ".npz":
        raise UsageError(f"{out}: weights are written to .pt, .safetensors or .npz files, not to {out.suffix!r}")
    if dtype != "float32":
        raise UsageError(f"--dtype={dtype}: .npz files have no {dtype}; use float32, or name a .safetensors file")
    return lambda path, tensors: np.savez(path, **tensors)


def as_stored(tensors: Mapping[str, Any], dtype: str) -> dict[str, np.ndarray]:
    """Returns contiguous, writable arrays of `dtype`.

    Contiguous: safetensors would write the memory of a transposed array as it lies there. Writable: for torch.
    """
    return {name: np.require(value, jnp.dtype(dtype), ["C", "W"]) for name, value in tensors.items()}


def refuse_present(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise UsageError(f"{path} is there already; name another file")


def _write_torch(torch: ModuleType, path: Path, tensors: dict[str, np.ndarray]) -> None:
    def tensor(value: np.ndarray):
        if value.dtype == jnp.bfloat16:  # which torch knows, but not as numpy's
            return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(value)

    torch.save({name: tensor(value) for name, value in tensors.items()}, path)
