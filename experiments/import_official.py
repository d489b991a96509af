"""Makes a run directory of a released checkpoint, for generate, evaluate and config.init_from.

  python -m experiments.import_official hnet_2stage_XL.pt hnet_2stage_XL.json runs/hnet_2stage_xl

Weights are read from .pt (which needs torch), .safetensors or .npz, under the release's names. The checkpoint
holds no optimizer's state: another run may start from its weights, but this one cannot be trained on.
"""
import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import commands
from experiments.config import DataConfig, RunConfig
from experiments.config.files import config_to_json, saved_fields
from experiments.errors import UsageError, run_command
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.manifest import prepare_workdir, write_manifest
from experiments.runs.saved_run import PARAMETERS_ONLY
from experiments.training.step import TrainState
from hnet import HNetConfig, from_official_json, load_official_params

SEQUENCE_LENGTH = 8192  # bytes; what the released models were trained on


def main(argv: list[str]) -> None:
    parser = commands.parser(__doc__, "import_official")
    parser.add_argument("weights", help="a .pt, .safetensors or .npz file")
    parser.add_argument("config", help="the release's .json file for it")
    parser.add_argument("out", help="the run directory to make")
    arguments = parser.parse_args(argv)
    import_official(Path(arguments.weights), Path(arguments.config), Path(arguments.out))


def import_official(weights: Path, config: Path, out: Path) -> None:
    """Reads `weights`, all or nothing, and writes `out` as a run at step 0.

    Raises:
      UsageError: a file is missing or not what it should be, they do not fit each other, or `out` has checkpoints.
    """
    if (out / "checkpoints").exists():
        raise UsageError(f"{out} has checkpoints already; name another directory")
    model = _read_config(config)
    try:
        params = load_official_params(open_state_dict(weights), model)
    except ValueError as error:
        raise UsageError(f"{weights} and {config} do not fit each other: {error}") from error
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{weights}: {count:,} parameters, {describe_layout(model)}")

    workdir = prepare_workdir(out)
    run = RunConfig(
        model=model, data=DataConfig(sequence_length=SEQUENCE_LENGTH, batch_size=1),
        tokens_per_chunk=paper_tokens_per_chunk(len(model.stages) - 1))
    (workdir / "config.json").write_text(config_to_json(run) + "\n")
    write_manifest(workdir, num_params=count, imported_from=str(weights.absolute()))
    meta = {"config": saved_fields(run), "contents": PARAMETERS_ONLY}
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.save(0, TrainState(jnp.zeros((), jnp.int32), params, opt_state=()), meta)
    checkpoints.close()
    print(f"{out}: {count * 4 / 1e6:,.1f} MB of float32 as checkpoint 0; try it with\n"
          f"  python -m experiments.generate --workdir={out} --prompt \"The \" --config.model.dtype=bfloat16")


def describe_layout(model: HNetConfig) -> str:
    """Returns such as "m4[T22]m4, widths 1024, 1536"."""
    layout = model.stages[-1].encoder
    for stage in reversed(model.stages[:-1]):
        layout = f"{stage.encoder}[{layout}]{stage.decoder}"
    return f"{layout}, widths {', '.join(str(stage.stack.width) for stage in model.stages)}"


def paper_tokens_per_chunk(num_chunking: int) -> tuple[float, ...]:
    """Returns the compression that the released models aimed at: 6 with one chunking stage, 3 and 3 with two."""
    return (6.0,) if num_chunking == 1 else (3.0,) * num_chunking


def open_state_dict(path: Path) -> Mapping[str, Any]:
    """Opens a file of tensors, which come into memory one by one as they are asked for.

    Raises:
      UsageError: the file is missing, of an unknown kind, damaged, or needs a package that is not there.
    """
    readers = {".pt": _open_torch, ".safetensors": _open_safetensors, ".npz": _open_npz}
    if path.suffix not in readers:
        raise UsageError(f"{path}: weights are read from {', '.join(readers)} files, not from {path.suffix!r}")
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    with _reading(path):
        return readers[path.suffix](path)


def import_package(name: str, path: Path) -> ModuleType:
    """Imports a package that only some kinds of file need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{path}: {path.suffix} files need {name.split('.')[0]}; "
                         "pip install 'hnet-jax[torch]'") from error


class TensorFile(Mapping):
    """The tensors of a file, each read when it is asked for.

    Args:
      names: our name for each tensor -> that in the file.
      read: returns a tensor by its name in the file.
    """

    def __init__(self, path: Path, names: Mapping[str, str], read: Callable[[str], Any]) -> None:
        self._path, self._names, self._read = path, names, read

    def __getitem__(self, name: str) -> Any:
        with _reading(self._path):
            return self._read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # each library has errors of its own for a file that is not what it should be
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} cannot be read: {type(error).__name__}: {reason}") from error


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


def _open_npz(path: Path) -> TensorFile:
    """Takes the arrays called param/<name> if there are any, as in a file of test vectors, else all."""
    file = np.load(path, allow_pickle=False)
    prefix = "param/" if any(name.startswith("param/") for name in file.files) else ""
    names = {name.removeprefix(prefix): name for name in file.files if name.startswith(prefix)}
    return TensorFile(path, names, file.__getitem__)


def _read_config(path: Path) -> HNetConfig:
    try:
        return from_official_json(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; name the release's .json file") from error
    except (ValueError, TypeError, KeyError, IndexError) as error:  # a JSON file may hold anything
        raise UsageError(f"{path} is no config file of the release: {error}") from error


if __name__ == "__main__":
    run_command(main)
