"""Writes the weights of a run for other programs.

  python -m experiments.export_weights llama --workdir=runs/mine DIRECTORY
  python -m experiments.export_weights hnet  --workdir=runs/x x.safetensors [--dtype=bfloat16]

`llama` makes a directory that the transformers library reads: model.safetensors, config.json and the tokenizer's
files. `hnet` has the official release's names, and x.json beside it describes the model; the name says which kind
of file it is: .pt (which needs torch), .safetensors or .npz.
"""
import json
from pathlib import Path
from typing import Any

from experiments import commands
from experiments.config.command_line import split_overrides
from experiments.errors import UsageError, run_command
from experiments.runs.saved_run import SavedRun
from experiments.weights.tensor_writers import as_stored, refuse_present, tensor_writer
from experiments.weights.tokenizer_files import tokenizer_for_transformers
from hnet import HNetConfig, to_llama_config, to_llama_params, to_official_json, to_official_params

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def main(argv: list[str]) -> None:
    parser = commands.parser(__doc__, "export_weights")
    families = parser.add_subparsers(dest="family", required=True, metavar="llama|hnet")
    llama = families.add_parser("llama", help="for the transformers library", allow_abbrev=False)
    hnet = families.add_parser("hnet", help="with the names of the official H-Net release", allow_abbrev=False)
    for family in (llama, hnet):
        commands.add_run_arguments(family, purpose="to export")
        family.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    llama.add_argument("out", help="a directory to make")
    hnet.add_argument("out", help="a .pt, .safetensors or .npz file to make")
    arguments = parser.parse_args(split_overrides(argv)[0])
    out, dtype = Path(arguments.out), arguments.dtype
    if arguments.family == "hnet":
        refuse_present(out.with_suffix(".json"))
        tensor_writer(out, dtype)  # refuses what it cannot write before the run is read
    else:
        refuse_present(out / WEIGHTS, out / CONFIG)
    with SavedRun.from_command_line(parser, argv) as saved:
        if arguments.family == "hnet":
            export_hnet(saved.params(), saved.config.model, out, dtype)
            written = [out, out.with_suffix(".json")]
        else:
            written = export_llama(saved, out, dtype)
    size = written[0].stat().st_size / 1e6
    print(f"step {saved.step} of {saved.workdir}: {written[0]} ({size:,.1f} MB of {dtype}) and "
          f"{', '.join(str(path) for path in written[1:])}")


def export_hnet(params: Any, model: HNetConfig, out: Path, dtype: str) -> None:
    """Writes `out` and its .json.

    Raises:
      UsageError: `out` cannot be written, or the release has no such model.
    """
    refuse_present(out.with_suffix(".json"))
    write = tensor_writer(out, dtype)
    try:
        text = to_official_json(model)
        tensors = to_official_params(params, model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    write(out, as_stored(tensors, dtype))
    out.with_suffix(".json").write_text(text + "\n")


def export_llama(saved: SavedRun, out: Path, dtype: str) -> list[Path]:
    """Writes the directory `out`, and returns the files: the weights, the config, and those of the tokenizer.

    Raises:
      UsageError: the files cannot be written, or the transformers library has no such model.
    """
    model = saved.config.model
    try:
        config = to_llama_config(model)  # before the weights are read
    except ValueError as error:
        raise UsageError(str(error)) from error
    texts, special = tokenizer_for_transformers(saved.config.data.tokenizer, saved.workdir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror or error}; name a directory to make") from error
    refuse_present(*(out / name for name in (CONFIG, *texts)))
    write = tensor_writer(out / WEIGHTS, dtype)
    write(out / WEIGHTS, as_stored(to_llama_params(saved.params(), model), dtype))
    texts = {CONFIG: json.dumps(config | special | {"torch_dtype": dtype}, indent=2) + "\n", **texts}
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in (WEIGHTS, *texts)]


if __name__ == "__main__":
    run_command(main)
