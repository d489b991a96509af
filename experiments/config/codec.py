"""Config dataclasses as nested plain values, which JSON can hold, and back.

  a config                          a dict of its fields
  a tuple of configs, `stages`      {"stage0": ..., "stage1": ...}
  any other tuple                   a list
  a field with "kinds"              see `experiments.config.schema`

A value of another type than its annotation says is refused, and so is a field that does not exist.
"""
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from experiments.config.schema import Field, fields_of, is_union, paths_below, show, tags_of
from experiments.errors import UsageError, suggest

Config = TypeVar("Config")


def to_fields(config: Any, path: str = "config") -> dict[str, Any]:
    """Returns the fields of `config` as plain values, from which `from_fields` makes an equal config.

    Raises:
      UsageError: a value is no tuple where one is wanted, or has a type that is not among the field's "kinds".
    """
    fields = {}
    for field in fields_of(type(config)).values():
        value, below = getattr(config, field.name), f"{path}.{field.name}"
        if field.tag:
            fields[field.tag] = field.name_of(value, below)
        fields[field.name] = _encode(value, field, below)
    return fields


def from_fields(kind: type[Config], fields: Any, path: str = "config") -> Config:
    """Makes a config of type `kind`; fields that are missing get their defaults.

    Raises:
      UsageError: a field does not exist, is missing and has no default, or has a value that does not fit.
    """
    if not isinstance(fields, Mapping):
        raise UsageError(f"{path} is {show(fields)}; the fields of a {kind.__name__} are wanted")
    known, tags, values = fields_of(kind), tags_of(kind), {}
    for name in fields:
        if name not in known and name not in tags:
            raise UsageError(unknown_field(name, path, kind, known))
    for field in known.values():
        if field.name in fields:
            values[field.name] = _decode(fields[field.name], field, f"{path}.{field.name}", fields)
        elif field.is_required:
            raise UsageError(f"{path} has no field {field.name!r}, without which there is no {kind.__name__}")
    try:
        return kind(**values)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def flat_fields(config: Any) -> dict[str, Any]:
    """Returns {"model.stages.stage0.stack.width": 64, ...}."""
    return dict(_flatten(to_fields(config)))


def unknown_field(name: str, path: str, kind: Any, known: Mapping[str, Any]) -> str:
    """Says that `path` has no field of that name, and which it has.

    A field of this very name further below is proposed first, then one whose name is like it, here or below.
    """
    deeper: dict[str, list[str]] = {}
    for found in paths_below(kind) if isinstance(kind, type) else ():
        deeper.setdefault(found.rpartition(".")[2], []).append(found)
    hint = suggest(name, [name] if name in deeper else known) or suggest(name, deeper)
    for leaf, paths in deeper.items():
        if leaf not in known:
            hint = hint.replace(repr(leaf), " or ".join(map(repr, paths)))
    return f"{path} has no field {name!r}{hint}; its fields: {', '.join(known)}"


def _encode(value: Any, field: Field, path: str) -> Any:
    if value is None and field.is_optional:
        return None
    if not field.is_tuple:
        return to_fields(value, path) if dataclasses.is_dataclass(value) else value
    if not isinstance(value, tuple):
        raise UsageError(f"{path} is {value!r}; a tuple is wanted")
    if field.kinds is not None:
        return {field.name_of(each, path): to_fields(each, path) for each in value}
    if field.is_group:
        return {f"{field.item}{index}": to_fields(each, f"{path}.{field.item}{index}")
                for index, each in enumerate(value)}
    return list(value)


def _decode(value: Any, field: Field, path: str, siblings: Mapping[str, Any]) -> Any:
    if value is None and field.is_optional:
        return None
    if field.tag:
        tag_path = f"{path.removesuffix(field.name)}{field.tag}"
        return from_fields(field.kind_of(siblings.get(field.tag), tag_path), value, path)
    if not field.is_tuple:
        return from_fields(field.kind, value, path) if field.is_group else check(value, field.kind, path)
    if not field.is_group:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{path} is {value!r}; a tuple is wanted")
        return tuple(check(each, field.kind, path) for each in value)
    if not isinstance(value, Mapping):
        raise UsageError(f"{path} is {value!r}; a group of fields is wanted")
    if field.kinds is not None:
        return tuple(from_fields(field.kind_of(name, path), each, f"{path}.{name}")
                     for name, each in value.items())
    names = [f"{field.item}{index}" for index in range(len(value))]
    if set(names) != set(value):
        raise UsageError(f"{path} must be named {', '.join(names)}; it has {', '.join(sorted(value))}")
    return tuple(from_fields(field.kind, value[name], f"{path}.{name}") for name in names)


def check(value: Any, kind: Any, path: str) -> Any:
    """Returns a plain value if it is of type `kind`, an int as a float where that is wanted.

    Raises:
      UsageError: it is of another type, or not finite.
    """
    if get_origin(kind) is Literal:
        choices = list(map(str, get_args(kind)))
        if value not in choices:
            raise UsageError(f"{path} {value!r} is not one of {', '.join(choices)}{suggest(str(value), choices)}")
        return value
    wanted = get_args(kind) if is_union(kind) else (kind,)
    if type(value) is int and float in wanted and int not in wanted:
        value = float(value)
    if type(value) not in wanted:
        names = " or ".join(each.__name__ for each in wanted)
        raise UsageError(f"{path} is {show(value)}; a value of type {names} is wanted")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{path} is {value!r}; numbers must be finite")
    return value


def _flatten(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", each) for name, each in _flatten(value))
        else:
            yield key, value
