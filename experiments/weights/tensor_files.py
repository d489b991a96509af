"""Files of tensors by name, which come into memory one by one as they are asked for."""
import contextlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from experiments.errors import UsageError

EXTRAS = {"torch": "torch", "safetensors": "pretrained", "gguf": "pretrained", "tokenizers": "pretrained"}
INDEX = "model.safetensors.index.json"


def open_tensors(path: Path) -> Mapping[str, Any]:
    """Opens a file of tensors, or a directory with model.safetensors or shards and their index.

    Raises:
      UsageError: the file is missing, of an unknown kind, damaged, or needs a package that is not there.
    """
    readers = {".pt": _open_torch, ".safetensors": _open_safetensors, ".npz": _open_npz}
    if path.is_dir():
        return _open_directory(path)
    if path.suffix not in readers:
        raise UsageError(f"{path}: weights are read from {', '.join(readers)} files, not from {path.suffix!r}")
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    with reading(path):
        return readers[path.suffix](path)


def import_package(name: str, path: Path) -> ModuleType:
    """Imports a package that only some kinds of file need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UsageError(f"{path}: {path.suffix or 'such'} files need {package}; "
                         f"pip install 'hnet-jax[{EXTRAS[package]}]'") from error


class TensorFile(Mapping):
    """The tensors of a file, each read when it is asked for.

    Args:
      names: our name for each tensor -> that in the file.
      read: returns a tensor by its name in the file.
    """

    def __init__(self, path: Path, names: Mapping[str, str], read: Callable[[str], Any]) -> None:
        self._path, self._names, self._read = path, names, read

    def __getitem__(self, name: str) -> Any:
        stored = self._names[name]
        with reading(self._path):
            return self._read(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever a library raises for a file that is not what it should be into a UsageError of one line."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # each library has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} cannot be read: {type(error).__name__}: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object; raises UsageError if it is not there or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__}, and an object with named fields is wanted")
    return value


def _open_torch(path: Path) -> TensorFile:
    torch = import_package("torch", path)
    # weights_only: a pickle could run any code. mmap: a tensor's pages are read when it is.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{path} holds no state dict, that is, tensors by name; save model.state_dict() in it")
    return TensorFile(path, {name: name for name in state}, state.__getitem__)


def _open_safetensors(path: Path) -> TensorFile:
    file = import_package("safetensors", path).safe_open(path, framework="numpy")
    return TensorFile(path, {name: name for name in file.keys()}, file.get_tensor)


def _open_directory(path: Path) -> Mapping[str, Any]:
    whole, index = path / "model.safetensors", path / INDEX
    if whole.is_file():
        return open_tensors(whole)
    if not index.is_file():
        raise UsageError(f"{path} has neither model.safetensors nor {INDEX}; name the file of weights in it")
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict):
        raise UsageError(f"{index} has no weight_map, which says which file holds which tensor")
    # A shard may only lie beside its index.
    shards = {name: open_tensors(path / Path(str(name)).name) for name in sorted(set(shard_of.values()))}
    lost = sorted(name for name, shard in shard_of.items() if name not in shards[shard])
    extra = sorted(name for shard in shards.values() for name in shard if name not in shard_of)
    if lost or extra:
        raise UsageError(
            f"{index} and its {len(shards)} files do not fit each other: {len(lost)} tensors are not where it "
            f"says ({', '.join(lost[:3])}), {len(extra)} are not in it ({', '.join(extra[:3])})")
    return TensorFile(path, {name: name for name in shard_of}, lambda name: shards[shard_of[name]][name])


def _open_npz(path: Path) -> TensorFile:
    """Takes the arrays called param/<name> if there are any, as in a file of test vectors, else all."""
    file = np.load(path, allow_pickle=False)
    prefix = "param/" if any(name.startswith("param/") for name in file.files) else ""
    names = {name.removeprefix(prefix): name for name in file.files if name.startswith(prefix)}
    return TensorFile(path, names, file.__getitem__)
