"""Fields of a config set from the command line: --config.model.stages.stage1.stack.width=128."""
import ast
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from experiments.config.codec import Config, check, from_fields, to_fields, unknown_field
from experiments.config.schema import Field, fields_of, is_union, show, tags_of
from experiments.errors import UsageError


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


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Returns `config` with the fields named in `overrides` set, all at once: together they must fit.

    Raises:
      UsageError: there is no such field, or the text is no value for it.
    """
    others, overrides = split_overrides(list(overrides))
    if others:
        raise UsageError(f"{others[0]!r} sets no config field; write --config.FIELD=VALUE")
    fields = to_fields(config)
    for override in overrides:
        name, text = override.split("=", maxsplit=1)
        node = _Node("config", type(config), fields)
        *parents, leaf = name.split(".")[1:]
        for key in parents:
            node = node.child(key)
        node.set(leaf, text)
    return from_fields(type(config), fields)


class _Node:
    """A group of fields on the way to the one that is set.

    Attributes:
      kind: a config class; or, for a tuple of configs, the field that holds it.
      values: the plain values of the fields.
    """

    def __init__(self, path: str, kind: type | Field, values: dict[str, Any]) -> None:
        self.path, self.kind, self.values = path, kind, values

    @property
    def names(self) -> list[str]:
        if isinstance(self.kind, Field):
            return list(self.values if self.kind.kinds is None else self.kind.kinds)
        return list(fields_of(self.kind))

    def child(self, key: str) -> "_Node":
        """Returns the group of fields below `key`; one that is None, or missing, begins with its defaults."""
        path = f"{self.path}.{key}"
        if key not in self.names:
            raise UsageError(f"--{path}: {unknown_field(key, self.path, self.kind, dict.fromkeys(self.names))}")
        if isinstance(self.kind, Field):
            kind = self.kind.kind if self.kind.kinds is None else self.kind.kinds[key]
            return _Node(path, kind, self.values.setdefault(key, {}))
        field = fields_of(self.kind)[key]
        if not field.is_group:
            raise UsageError(f"--{path}: {path} is {show(self.values.get(key))} and has no fields below it")
        if self.values.get(key) is None:
            self.values[key] = {}
        kind = field.kind_of(self.values[field.tag], path) if field.tag else field.kind
        return _Node(path, field if field.is_tuple else kind, self.values[key])

    def set(self, key: str, text: str) -> None:
        """Sets the field `key` to what `text` says."""
        name = f"--{self.path}.{key}"
        if not isinstance(self.kind, Field):
            if key in tags_of(self.kind):
                _refuse_other_tag(name, text, tags_of(self.kind)[key], self.values[key])
                return
            field = fields_of(self.kind).get(key)
            if field is not None and ((field.is_optional and text.lower() == "none") or not field.is_group):
                self.values[key] = _parse(name, text, field, self.values.get(key))
                return
        raise UsageError(f"{name} is a group of fields; set one of them: {', '.join(self.child(key).names)}")


def _refuse_other_tag(name: str, text: str, field: Field, now: str) -> None:
    field.kind_of(text, name)
    if text != now:
        raise UsageError(f"{name}={text}: the fields of {field.name} are those of {now!r}; load a config that has "
                         f"{text!r}")


def _parse(name: str, text: str, field: Field, default: Any) -> Any:
    """Returns `text` as a value of the field."""
    if field.is_optional and text.lower() == "none":
        return None
    if get_origin(field.kind) is Literal:
        return check(text, field.kind, name)
    try:
        return _parse_tuple(text, field.kind) if field.is_tuple else _PARSERS[field.kind](text)
    except ValueError as error:
        hint = ", or none" if field.is_optional else ""
        raise UsageError(f"{name}={text}: {error}{hint}; the default is {show(default)}") from None


def _parse_bool(text: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise ValueError("a bool is wanted, true or false")
    return values[text.lower()]


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        value = _number_or_nan(text)
        if not value.is_integer():  # so is 1e3, but neither 1.5 nor inf nor words
            raise ValueError("an int is wanted") from None
        return int(value)


def _parse_float(text: str) -> float:
    value = _number_or_nan(text)
    if not math.isfinite(value):
        raise ValueError("a finite float is wanted")
    return value


_PARSERS = {bool: _parse_bool, int: _parse_int, float: _parse_float, str: str}


def _parse_tuple(text: str, kind: Any) -> list[Any]:
    kinds = get_args(kind) if is_union(kind) else (kind,)
    names = " or ".join(sorted(each.__name__ for each in kinds))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, tuple):
        raise ValueError(f"a tuple of {names} is wanted, such as '(1, 2)'; one element is '(1,)'")
    if kinds == (float,):
        value = tuple(float(part) if type(part) is int else part for part in value)
    unfit = [part for part in value if type(part) not in kinds or part in (math.inf, -math.inf)]
    if unfit:
        raise ValueError(f"its elements must be {names}, and {unfit[0]!r} is not")
    return list(value)


def _number_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
