"""Configs: found by name, changed from the command line, carried as JSON in a run's files.

A config file has a function `get_config()` that returns an ml_collections ConfigDict. Its values are
bool, int, float, str, or tuples of these. There are no lists, so a JSON list reads back as a tuple, and
no None, which the command line could not write: "off" is 0, "" or ().
"""
import ast
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.errors import UsageError, suggest

CONFIGS_DIRECTORY = Path(__file__).resolve().parents[2] / "configs"
_SCALARS = (bool, int, float, str)


def load_config(name: str, overrides: list[str], *, directory: Path = CONFIGS_DIRECTORY) -> ConfigDict:
    """Loads a config and sets the fields named in `overrides`.

    Args:
      name: "quickstart" for quickstart.py in `directory` or a folder of it, or the path of a file ending in ".py".
      overrides: "--config.optimizer.peak_lr=1e-3", or the same as two strings.
    Returns:
      A locked config: setting a field that it does not have raises.
    Raises:
      UsageError: no such config, a file that gives none, or an override that does not fit it.
    """
    path = _find(name, directory)
    return apply_overrides(_run_get_config(path), overrides)


def apply_overrides(config: ConfigDict, overrides: list[str]) -> ConfigDict:
    """Returns a locked copy of `config` with the fields named in `overrides` set."""
    others, overrides = split_overrides(overrides)
    if others:
        raise UsageError(f"{others[0]!r} sets no config field; write --config.FIELD=VALUE")
    config = ConfigDict(config.to_dict())
    for override in overrides:
        field, text = override.split("=", maxsplit=1)
        *parents, leaf = field.removeprefix("--").split(".")[1:]
        node, prefix = config, "config"
        for key in parents:
            node, prefix = _child(node, prefix, key), f"{prefix}.{key}"
            if not isinstance(node, ConfigDict):
                raise UsageError(f"{field}: {prefix} is {node!r} and has no fields below it")
        node[leaf] = _parse(field, text, default=_child(node, prefix, leaf))
    return config.lock()


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into its other arguments and its overrides, each "--config.a.b=value"."""
    others, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            others.append(argument)
        elif "=" in argument:
            overrides.append(argument)
        else:
            value = next(arguments, "--")
            if value.startswith("--"):
                raise UsageError(f"{argument} needs a value: {argument}=VALUE")
            overrides.append(f"{argument}={value}")
    return others, overrides


def config_to_json(config: ConfigDict) -> str:
    """Writes `config` as JSON, from which `config_from_json` makes an equal config."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, allow_nan=False)


def config_from_json(text: str) -> ConfigDict:
    return ConfigDict(_tuples_for_lists(json.loads(text))).lock()


def flat_fields(config: ConfigDict) -> dict[str, Any]:
    """{"model.stages.stage0.width": 64, ...}"""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{name}": each for name, each in flat_fields(value).items()}
        else:
            flat[key] = value
    return flat


def _find(name: str, directory: Path) -> Path:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"--config={name}: there is no such file")
        return path
    found = configs_in(directory)
    available = sorted(found)
    if name not in available:
        raise UsageError(
            f"--config={name}: no config of that name{suggest(name, available)}; available: "
            f"{', '.join(available) or 'none'} (or give the path of a .py file)"
        )
    return found[name]


def configs_in(directory: Path = CONFIGS_DIRECTORY) -> dict[str, Path]:
    """Maps the bare name of every config in `directory` and its sub-folders to its file."""
    return {path.stem: path for path in sorted(directory.rglob("*.py")) if not path.stem.startswith("_")}


def _run_get_config(path: Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UsageError("the file has no function get_config()")
        config = module.get_config()
        if not isinstance(config, ConfigDict):
            raise UsageError(f"get_config() must return a ConfigDict, not a {type(config).__name__}")
        _check_values(config, prefix="config")
    except UsageError as error:
        raise UsageError(f"--config={path}: {error}") from error
    except Exception as error:  # a config file may raise anything; the cause stays chained
        message = " ".join(str(error).split())
        raise UsageError(f"--config={path} raised {type(error).__name__}: {message}") from error
    return config


def _check_values(config: ConfigDict, prefix: str) -> None:
    for key, value in config.items():
        field = f"{prefix}.{key}"
        if isinstance(value, ConfigDict):
            _check_values(value, field)
            continue
        for part in value if isinstance(value, tuple) else (value,):
            if type(part) not in _SCALARS:
                raise UsageError(
                    f"{field} is {value!r}; a field holds a bool, int, float, str, or a tuple of these "
                    "(for a list use a tuple, for None use 0, '' or ())"
                )
            if isinstance(part, float) and not math.isfinite(part):
                raise UsageError(f"{field} is {value!r}; numbers must be finite (for 'off' use 0)")


def _child(node: ConfigDict, prefix: str, key: str) -> Any:
    if key not in node:
        raise UsageError(
            f"--{prefix}.{key}: {prefix} has no field {key!r}{suggest(key, node.keys())}; "
            f"its fields: {', '.join(node.keys())}"
        )
    return node[key]


def _parse(field: str, text: str, default: Any) -> Any:
    """Returns `text` as a value of the type of `default`."""
    if isinstance(default, ConfigDict):
        raise UsageError(f"{field} is a group of fields; set one of them: {', '.join(default.keys())}")
    if isinstance(default, str):
        return text
    parse = {bool: _parse_bool, int: _parse_int, float: _parse_float, tuple: _parse_tuple}[type(default)]
    try:
        return parse(text, default)
    except ValueError as error:
        raise UsageError(f"{field}={text}: {error}; the default is {default!r}") from None


def _parse_bool(text: str, default: bool) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise ValueError("a bool is wanted, true or false")
    return values[text.lower()]


def _parse_int(text: str, default: int) -> int:
    try:
        return int(text)
    except ValueError:
        value = _number_or_nan(text)
        if not value.is_integer():  # so is 1e3, but neither 1.5 nor inf nor words
            raise ValueError("an int is wanted") from None
        return int(value)


def _parse_float(text: str, default: float) -> float:
    value = _number_or_nan(text)
    if not math.isfinite(value):
        raise ValueError("a finite float is wanted")
    return value


def _parse_tuple(text: str, default: tuple) -> tuple:
    kinds = {type(part) for part in default} or set(_SCALARS)
    names = " or ".join(sorted(kind.__name__ for kind in kinds))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, tuple):
        raise ValueError(f"a tuple of {names} is wanted, such as '(1, 2)'; one element is '(1,)'")
    if kinds == {float}:
        value = tuple(float(part) if type(part) is int else part for part in value)
    unfit = [part for part in value if type(part) not in kinds or part in (math.inf, -math.inf)]
    if unfit:
        raise ValueError(f"its elements must be {names}, and {unfit[0]!r} is not")
    return value


def _number_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _tuples_for_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_for_lists(each) for key, each in value.items()}
    return tuple(value) if isinstance(value, list) else value
