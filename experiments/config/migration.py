"""Configs as earlier versions wrote them, brought to the format of today, for all that reads a saved config.

  format 1  has no number. The fields of a stage lie side by side, as "num_heads" and "ssm_state_size"; a window
            of -1 sees all; no boundary_lm is {}. A task has a "stage" with the fields of a stack alone.
  format 2  the dataclasses of today, as `experiments.config.codec` writes them
"""
from collections.abc import Mapping
from typing import Any

from experiments.errors import UsageError

FORMAT = 2
_ATTENTION = ("num_heads", "rotary_width", "window")
_STACK = ("width", "feed_forward_width", "remat")
_STAGE = ("encoder", "decoder")
_RECURRENCE = "ssm_"  # begins the names of its fields


def migrate(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a saved config as the format of today has them, without its number.

    Raises:
      UsageError: they were written by a later version.
    """
    fields = dict(fields)
    number = fields.pop("format", 1)
    if number == 1:
        return _from_format_1(fields)
    if number != FORMAT:
        raise UsageError(f"the config was saved in format {number}, and this version knows formats up to "
                         f"{FORMAT}; use the version that saved it")
    return fields


def _from_format_1(fields: dict[str, Any]) -> dict[str, Any]:
    if "stage" in fields:  # of a task
        fields["stack"] = _stage(fields.pop("stage"))["stack"]
    if "model" in fields:
        fields["model"] = _model(fields["model"])
    return fields


def _model(fields: Mapping[str, Any]) -> dict[str, Any]:
    stages = {name: _stage(stage) for name, stage in fields["stages"].items()}
    boundary_lm = fields.get("boundary_lm")
    return {**fields, "stages": stages, "boundary_lm": _model(boundary_lm) if boundary_lm else None}


def _stage(fields: Mapping[str, Any]) -> dict[str, Any]:
    stage: dict[str, Any] = {"stack": {"attention": {}, "recurrence": {}}, "chunking": {}}
    stack = stage["stack"]
    for name, value in fields.items():
        if name in _ATTENTION:
            stack["attention"][name] = None if (name, value) == ("window", -1) else value
        elif name.startswith(_RECURRENCE):
            stack["recurrence"][name.removeprefix(_RECURRENCE)] = value
        elif name in _STACK:
            stack[name] = value
        elif name in _STAGE:
            stage[name] = value
        else:
            stage["chunking"][name] = value
    return stage
