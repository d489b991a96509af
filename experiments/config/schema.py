"""The fields of config classes, read off their annotations once for all that reads, writes or sets them.

A field holds bool, int, float, str, a Literal, another config, `X | None` of these, or a tuple of any length. Two
entries of its metadata help where the annotation leaves a type open:

  kinds   name -> type; a value is written under the name of its type
  tag     the name of a further field, beside this one, that holds the name; without it, values of a tuple are
          written as a dict with their names
"""
import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from experiments.errors import UsageError, suggest


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config class.

    Attributes:
      kind: its type, without the None of `X | None`; of a tuple the type of its elements.
      is_required: there is no default.
      kinds, tag: see above; None and "" where the annotation says it all.
    """

    name: str
    kind: Any
    is_tuple: bool
    is_optional: bool
    is_required: bool
    kinds: Mapping[str, type] | None
    tag: str

    @property
    def is_group(self) -> bool:
        """Whether there are fields below it."""
        return dataclasses.is_dataclass(self.kind) or self.kinds is not None

    @property
    def item(self) -> str:
        """The name of an element of a tuple of configs, but for its number: "stage" in `stages`."""
        return self.name.removesuffix("s")

    def name_of(self, value: Any, path: str) -> str:
        """Returns the name in `kinds` of the type of a value."""
        names = [name for name, kind in self.kinds.items() if kind is type(value)]
        if not names:
            raise UsageError(f"{path} has a {type(value).__name__}; "
                             f"it may be {', '.join(kind.__name__ for kind in self.kinds.values()) or 'nothing'}")
        return names[0]

    def kind_of(self, name: Any, path: str) -> type:
        """Returns the type that `kinds` has under a name."""
        if name not in self.kinds:
            hint = "" if self.tag else "; the module that registers it must be imported first"
            raise UsageError(f"{path} {name!r} is not one of {', '.join(self.kinds) or 'none'}"
                             f"{suggest(str(name), self.kinds) or hint}")
        return self.kinds[name]


@functools.cache
def fields_of(kind: type) -> Mapping[str, Field]:
    """Returns the fields of a config class by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: _read(field, hints[field.name], kind) for field in dataclasses.fields(kind)}


def tags_of(kind: type) -> dict[str, Field]:
    """Returns the fields that have a name beside them to tell their type, by that of the name."""
    return {field.tag: field for field in fields_of(kind).values() if field.tag}


def paths_below(kind: type, seen: tuple[type, ...] = ()) -> Iterator[str]:
    """Yields the paths of all fields below a config class, but for those in tuples and in itself once more."""
    for field in fields_of(kind).values():
        yield field.name
        if dataclasses.is_dataclass(field.kind) and not field.is_tuple and field.kind not in (*seen, kind):
            yield from (f"{field.name}.{path}" for path in paths_below(field.kind, (*seen, kind)))


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (types.UnionType, typing.Union)


def show(value: Any) -> str:
    """Writes a value as Python does, lists of plain values as the tuples that they stand for."""
    return repr(tuple(value) if isinstance(value, list) else value)


def _read(field: dataclasses.Field, hint: Any, owner: type) -> Field:
    parts = [part for part in get_args(hint) if part is not types.NoneType]
    is_optional = is_union(hint) and len(parts) < len(get_args(hint))
    if is_optional and len(parts) == 1:
        hint = parts[0]
    is_tuple = get_origin(hint) is tuple
    if is_tuple:
        hint, *rest = get_args(hint)
        if rest != [...]:
            raise TypeError(f"{owner.__name__}.{field.name}: tuples of configs have any length, tuple[X, ...]")
    return Field(
        name=field.name, kind=hint, is_tuple=is_tuple, is_optional=is_optional,
        is_required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        kinds=field.metadata.get("kinds"), tag=field.metadata.get("tag", ""))
