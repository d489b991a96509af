"""Makes a run directory of released weights, for generate, evaluate and config.init_from.

  python -m experiments.import_weights llama MODEL.gguf runs/mine
  python -m experiments.import_weights llama DIRECTORY  runs/mine
  python -m experiments.import_weights hnet  hnet_2stage_XL.pt runs/xl

`llama` reads Llama, Mistral, Qwen2 and Qwen3: a GGUF file, or a directory with config.json, tokenizer.json and
.safetensors, in one file or in shards. `hnet` reads the official H-Net release: .pt (which needs torch),
.safetensors or .npz, and the release's .json file. There is no optimizer's state in such files: another run may
start from the weights, but this one cannot be trained on.
"""
import argparse
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import commands
from experiments.config import DataConfig
from experiments.errors import UsageError, run_command
from experiments.weights.gguf_file import open_gguf
from experiments.weights.run_directory import count_params, describe_layout, refuse_taken, write_run
from experiments.weights.tensor_files import open_tensors, read_json
from experiments.weights.tokenizer_files import (
    TOKENIZER,
    check_tokenizer,
    tokenizer_from_files,
    tokenizer_from_gguf,
)
from hnet import HNetConfig, from_official_json, llama_config, load_llama_params, load_official_params

HNET_LENGTH = 8192  # bytes; what the released models were trained on
LLAMA_LENGTH = 2048  # tokens of a window that is evaluated


def main(argv: list[str]) -> None:
    parser = commands.parser(__doc__, "import_weights")
    families = parser.add_subparsers(dest="family", required=True, metavar="llama|hnet")
    llama = families.add_parser("llama", help="Llama, Mistral, Qwen2 and Qwen3", allow_abbrev=False)
    llama.add_argument("weights", help="a .gguf file, or a directory with config.json and .safetensors")
    llama.add_argument("--tokenizer", default="", help="a tokenizer.json that is elsewhere; none = bytes")
    hnet = families.add_parser("hnet", help="the official H-Net release", allow_abbrev=False)
    hnet.add_argument("weights", help="a .pt, .safetensors or .npz file")
    hnet.add_argument("--config_json", help="the release's .json file; by default beside the weights")
    for family in (llama, hnet):
        family.add_argument("out", help="the run directory to make")
        family.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                            help="of the model's activations; its weights are kept as float32")
    arguments = parser.parse_args(argv)
    {"llama": _llama, "hnet": _hnet}[arguments.family](arguments)
    print(f"{arguments.out}: checkpoint 0; try it with\n"
          f"  python -m experiments.generate --workdir={arguments.out} --prompt \"The \"")


def import_llama(weights: Path, out: Path, *, tokenizer: str = "", dtype: str = "float32") -> None:
    """Reads a GGUF file or a directory, all or nothing, and writes `out` as a run at step 0.

    Args:
      tokenizer: a tokenizer.json in place of the model's own; "none" for a model of bytes.
    Raises:
      UsageError: a file is missing or not what it should be, they do not fit each other, or `out` has checkpoints.
    """
    refuse_taken(out)
    source = _open_llama(weights, tokenizer)
    try:
        model = llama_config(source.config_json, dtype=dtype)
    except (ValueError, TypeError, ZeroDivisionError) as error:  # a JSON file may hold anything
        raise UsageError(f"{weights} has a config that there is no model for: {error}") from error
    vocabulary = _check_tokenizer(source.tokenizer, model)
    try:
        params = load_llama_params(source.tensors, model)
    except ValueError as error:
        raise UsageError(f"{weights}: its weights and its config do not fit each other: {error}") from error
    print(f"{weights}: {count_params(params):,} parameters, {describe_layout(model)}, {vocabulary}")
    data = DataConfig(
        sequence_length=min(LLAMA_LENGTH, model.context_length or LLAMA_LENGTH), batch_size=1,
        tokenizer=TOKENIZER if source.tokenizer else "")
    write_run(out, model, params, data, source=weights, files=source.tokenizer)


def import_hnet(weights: Path, config: Path, out: Path, *, dtype: str = "float32") -> None:
    """Reads the files of the official release, all or nothing, and writes `out` as a run at step 0.

    Raises:
      UsageError: a file is missing or not what it should be, they do not fit each other, or `out` has checkpoints.
    """
    refuse_taken(out)
    model = dataclasses.replace(_read_release_config(config), dtype=dtype)
    try:
        params = load_official_params(open_tensors(weights), model)
    except ValueError as error:
        raise UsageError(f"{weights} and {config} do not fit each other: {error}") from error
    print(f"{weights}: {count_params(params):,} parameters, {describe_layout(model)}")
    write_run(out, model, params, DataConfig(sequence_length=HNET_LENGTH, batch_size=1), source=weights)


class _Source(NamedTuple):
    config_json: Mapping[str, Any]
    tensors: Mapping[str, Any]
    tokenizer: dict[str, str]  # texts of its files by name; none for a model of bytes


def _open_llama(weights: Path, tokenizer: str) -> _Source:
    if weights.suffix != ".gguf" and not weights.is_dir():
        there = "is neither a .gguf file nor a" if weights.exists() else "is not there: name a .gguf file or a"
        raise UsageError(f"{weights} {there} directory with config.json and .safetensors")
    if weights.suffix == ".gguf":
        file = open_gguf(weights)
        config_json, tensors = file.config_json, file.tensors
    else:
        config_json, tensors = read_json(weights / "config.json"), open_tensors(weights)
    if tokenizer == "none":
        texts = {}
    elif tokenizer:
        texts = tokenizer_from_files(Path(tokenizer).expanduser())
    elif weights.suffix == ".gguf":
        texts = tokenizer_from_gguf(weights, file.metadata)
    else:
        texts = tokenizer_from_files(weights / TOKENIZER)
    return _Source(config_json, tensors, texts)


def _check_tokenizer(texts: Mapping[str, str], model: HNetConfig) -> str:
    if not texts:
        if model.vocab_size < 256:
            raise UsageError(f"--tokenizer=none: a model of bytes has 256 embeddings or more, and this one has "
                             f"{model.vocab_size}; name its tokenizer.json")
        return "bytes"
    with tempfile.TemporaryDirectory() as directory:
        for name, text in texts.items():
            (Path(directory) / name).write_text(text, encoding="utf-8")
        return check_tokenizer(Path(directory), model.vocab_size)


def _llama(arguments: argparse.Namespace) -> None:
    weights, out = Path(arguments.weights), Path(arguments.out)
    import_llama(weights, out, tokenizer=arguments.tokenizer, dtype=arguments.dtype)


def _hnet(arguments: argparse.Namespace) -> None:
    weights = Path(arguments.weights)
    config = Path(arguments.config_json) if arguments.config_json else weights.with_suffix(".json")
    import_hnet(weights, config, Path(arguments.out), dtype=arguments.dtype)


def _read_release_config(path: Path) -> HNetConfig:
    try:
        return from_official_json(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; name the release's .json file with "
                         "--config_json=PATH") from error
    except (ValueError, TypeError, KeyError, IndexError) as error:  # a JSON file may hold anything
        raise UsageError(f"{path} is no config file of the release: {error}") from error


if __name__ == "__main__":
    run_command(main)
