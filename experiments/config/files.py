"""Configs found by name, and carried as JSON in the files of a run.

A config file has a function `get_config()` that returns a config: a frozen dataclass such as RunConfig.
"""
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config.codec import Config, from_fields, to_fields
from experiments.config.command_line import apply_overrides
from experiments.config.migration import FORMAT, migrate
from experiments.errors import UsageError, suggest

CONFIGS_DIRECTORY = Path(__file__).resolve().parents[2] / "configs"


def load_config(
    name: str, overrides: Sequence[str], kind: type[Config], *, directory: Path = CONFIGS_DIRECTORY
) -> Config:
    """Loads a config of type `kind` and sets the fields named in `overrides`.

    Args:
      name: "quickstart" for quickstart.py in `directory` or a folder of it, or the path of a file ending in ".py".
      overrides: "--config.optimizer.peak_lr=1e-3", or the same as two strings.
    Raises:
      UsageError: no such config, a file that gives none of this kind, or an override that does not fit it.
    """
    return apply_overrides(_run_get_config(_find(name, directory), kind), overrides)


def saved_fields(config: Any) -> dict[str, Any]:
    """Returns `config` as the plain values that a file holds, with the number of their format."""
    return {"format": FORMAT, **to_fields(config)}


def config_from_saved(fields: Mapping[str, Any], kind: type[Config]) -> Config:
    """The inverse of `saved_fields`, for values that earlier versions saved too.

    Raises:
      UsageError: they are those of no config of this kind.
    """
    return from_fields(kind, migrate(fields))


def config_to_json(config: Any) -> str:
    """Writes `config` as JSON, from which `config_from_json` makes an equal config."""
    return json.dumps(saved_fields(config), indent=2, sort_keys=True, allow_nan=False)


def config_from_json(text: str, kind: type[Config]) -> Config:
    """Reads what `config_to_json` wrote, or what earlier versions did."""
    return config_from_saved(json.loads(text), kind)


def configs_in(directory: Path = CONFIGS_DIRECTORY) -> dict[str, Path]:
    """Maps the bare name of every config in `directory` and its sub-folders to its file."""
    return {path.stem: path for path in sorted(directory.rglob("*.py")) if not path.stem.startswith("_")}


def _find(name: str, directory: Path) -> Path:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"--config={name}: there is no such file")
        return path
    found = configs_in(directory)
    if name not in found:
        raise UsageError(
            f"--config={name}: no config of that name{suggest(name, found)}; available: "
            f"{', '.join(sorted(found)) or 'none'} (or give the path of a .py file)")
    return found[name]


def _run_get_config(path: Path, kind: type[Config]) -> Config:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UsageError("the file has no function get_config()")
        config = module.get_config()
        if not isinstance(config, kind):
            raise UsageError(f"get_config() must return a {kind.__name__}, not a {type(config).__name__}")
        return from_fields(kind, to_fields(config))  # refuses values that their annotations do not allow
    except UsageError as error:
        raise UsageError(f"--config={path}: {error}") from error
    except Exception as error:  # a config file may raise anything; the cause stays chained
        message = " ".join(str(error).split())
        raise UsageError(f"--config={path} raised {type(error).__name__}: {message}") from error
