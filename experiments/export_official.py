"""Writes the weights of a run under the official release's names, and beside them its config file.

  python -m experiments.export_official --workdir=runs/x x.safetensors [--dtype=bfloat16]

The name says what kind of file it is: .pt (which needs torch), .safetensors or .npz. x.json describes the model.
"""
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import commands
from experiments.config.command_line import split_overrides
from experiments.errors import UsageError, run_command
from experiments.import_official import import_package
from experiments.runs.saved_run import SavedRun
from hnet import HNetConfig, to_official_json, to_official_params

Write = Callable[[Path, dict[str, np.ndarray]], None]


def main(argv: list[str]) -> None:
    parser = commands.run_parser(__doc__, "export_official", purpose="to export")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("out", help="a .pt, .safetensors or .npz file to make")
    arguments = parser.parse_args(split_overrides(argv)[0])
    out = Path(arguments.out)
    _writer(out, arguments.dtype)  # refuses what it cannot write before the run is read
    with SavedRun.from_command_line(parser, argv) as saved:
        export_official(saved.params(), saved.config.model, out, arguments.dtype)
    print(f"step {saved.step} of {saved.workdir}: {out} ({out.stat().st_size / 1e6:,.1f} MB of {arguments.dtype}) "
          f"and {out.with_suffix('.json')}")


def export_official(params: Any, model: HNetConfig, out: Path, dtype: str) -> None:
    """Writes `out` and its .json.

    Raises:
      UsageError: `out` cannot be written, or the release has no such model.
    """
    write = _writer(out, dtype)
    try:
        text = to_official_json(model)
        tensors = to_official_params(params, model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    # Contiguous: safetensors would write the memory of a transposed array as it lies there. Writable: for torch.
    tensors = {name: np.require(value, jnp.dtype(dtype), ["C", "W"]) for name, value in tensors.items()}
    write(out, tensors)
    out.with_suffix(".json").write_text(text + "\n")


def _writer(out: Path, dtype: str) -> Write:
    """Returns what writes files of this kind, after all that could be wrong with the name was looked at."""
    for path in (out, out.with_suffix(".json")):
        if path.exists():
            raise UsageError(f"{path} is there already; name another file")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: there is no directory {out.absolute().parent}; make it first")
    if out.suffix == ".pt":
        return partial(_write_torch, import_package("torch", out))
    if out.suffix == ".safetensors":
        save_file = import_package("safetensors.numpy", out).save_file
        return lambda path, tensors: save_file(tensors, path)
    if out.suffix != ".npz":
        raise UsageError(f"{out}: weights are written to .pt, .safetensors or .npz files, not to {out.suffix!r}")
    if dtype != "float32":
        raise UsageError(f"--dtype={dtype}: .npz files have no {dtype}; use float32, or name a .safetensors file")
    return lambda path, tensors: np.savez(path, **tensors)


def _write_torch(torch: ModuleType, path: Path, tensors: dict[str, np.ndarray]) -> None:
    def tensor(value: np.ndarray):
        if value.dtype == jnp.bfloat16:  # which torch knows, but not as numpy's
            return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(value)

    torch.save({name: tensor(value) for name, value in tensors.items()}, path)


if __name__ == "__main__":
    run_command(main)
