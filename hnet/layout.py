"""Mixers by name, and layouts made of their names: "T1m4" is one T, then four m.

`register_mixer` is the one place where a mixer gets its name, its module, its check and its config. It is called
for our own mixers in `hnet.mixers`, and from any other package for those that live there.
"""
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

_NAME = re.compile("[a-z][a-z_]*")
_LAYOUT_ITEM = re.compile("([A-Za-z_]+)([1-9][0-9]*)")


@dataclasses.dataclass(frozen=True)
class RegisteredMixer:
    """One entry of MIXERS.

    Attributes:
      description: the mixer in a few words.
      make: called with (stack, out_init_std=, dtype=, name=), where `stack` is a StackConfig, and with parent=None
        for a module outside any other; returns the module, to which it hands on name and parent.
      config: the frozen dataclass of the mixer's own sizes, if it has any; its defaults must make a whole one.
      check: called with a StackConfig before any work; raises ValueError where its sizes do not fit the mixer.
    """

    description: str
    make: Callable[..., Any]
    config: type | None = None
    check: Callable[[Any], None] | None = None


_MIXERS: dict[str, RegisteredMixer] = {}
_CONFIGS: dict[str, type] = {}
MIXERS: Mapping[str, RegisteredMixer] = MappingProxyType(_MIXERS)        # all that are registered, by name
MIXER_CONFIGS: Mapping[str, type] = MappingProxyType(_CONFIGS)           # name -> config, of those that have one


def register_mixer(
    name: str,
    description: str,
    make: Callable[..., Any],
    *,
    config: type | None = None,
    check: Callable[[Any], None] | None = None,
) -> None:
    """Gives layouts a word for a mixer.

    A mixer with sizes of its own brings them as `config`. They travel in `StackConfig.mixers`, which the JSON of a
    run and the command line reach under the mixer's name, as in
    --config.model.stages.stage0.stack.mixers.NAME.FIELD=VALUE; `make` reads them with `stack.mixer_config`.

    Args:
      name: lower-case letters; "name2" in a layout is two layers, "Name2" two that carry a feed-forward network.
      description, make, config, check: see `RegisteredMixer`.
    Raises:
      ValueError: the name is no such word or has a mixer already, `make` takes other arguments, or `config` is no
        frozen dataclass, has a field without a default, or belongs to another mixer.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"mixer name {name!r} must be lower-case letters, such as 'landmark'")
    if name in _MIXERS:
        raise ValueError(f"mixer {name!r} is registered already ({_MIXERS[name].description}); choose another "
                         "name, and register in a module that is imported, and so runs, once")
    try:
        inspect.signature(make).bind(None, out_init_std=0.0, dtype=None, name=name, parent=None)
    except TypeError as error:
        raise ValueError(f"make of mixer {name!r} must take (stack, *, out_init_std, dtype, **module), and hand "
                         f"`module`, which is name and parent, on to the module: {error}") from None
    if config is not None:
        _check_config(name, config)
        _CONFIGS[name] = config
    _MIXERS[name] = RegisteredMixer(description, make, config, check)


def parse_layout(layout: str) -> tuple[tuple[str, int], ...]:
    """Splits "T1m4" into (("T", 1), ("m", 4)).

    Raises:
      ValueError: something other than names in MIXERS, as they are or with a capital, each with a count.
    """
    runs = tuple((name, int(count)) for name, count in _LAYOUT_ITEM.findall(layout))
    known = all(mixer_of(name) in MIXERS and name[1:] == mixer_of(name)[1:] for name, _ in runs)
    if _LAYOUT_ITEM.sub("", layout) or not known:
        raise ValueError(
            f"layout {layout!r} must be names of mixers, each followed by a count, as in 'T1m4' or 'gla2'; mixers "
            f"are {', '.join(MIXERS)}, and with a capital they carry a feed-forward network")
    return runs


def mixer_of(name: str) -> str:
    """Returns the key in MIXERS of a name in a layout."""
    return name.lower()


def has_feed_forward(name: str) -> bool:
    """Returns whether the blocks of that name in a layout carry a feed-forward network."""
    return name[0].isupper()


def residual_depth(*layouts: str) -> int:
    """Counts the writes to the residual stream by all layers of `layouts`, for the scale of out-projections.

    A block writes once, one with a feed-forward network twice. A stage adds its layouts to those around it.
    """
    runs = [run for layout in layouts for run in parse_layout(layout)]
    return sum(count * (2 if has_feed_forward(name) else 1) for name, count in runs)


def _check_config(name: str, config: type) -> None:
    if not dataclasses.is_dataclass(config) or not config.__dataclass_params__.frozen:
        raise ValueError(f"the config of mixer {name!r} must be a frozen dataclass, not {config!r}")
    owners = [other for other, kind in _CONFIGS.items() if kind is config]
    if owners:
        raise ValueError(f"{config.__name__} is the config of mixer {owners[0]!r}; give mixer {name!r} one of its "
                         "own")
    try:
        config()
    except TypeError as error:
        raise ValueError(f"{config.__name__}, the config of mixer {name!r}, must have defaults: {error}") from None
