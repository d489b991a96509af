"""A run on disk, opened again by the commands that look at it: its config, its parameters, its corpus."""
import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from experiments.config import DataConfig, RunConfig
from experiments.config.command_line import apply_overrides, split_overrides
from experiments.config.files import config_from_saved
from experiments.data import Corpus, load_corpus
from experiments.errors import UsageError
from experiments.runs.checkpoints import Checkpoints, Restored, array_types, first_misfit
from experiments.training.mesh import make_mesh, use_mesh
from experiments.training.step import TrainState, compile_program, weights

PARAMETERS_ONLY = "parameters"  # meta["contents"] of a checkpoint without an optimizer's state


class Run(NamedTuple):
    workdir: Path
    config: RunConfig
    mesh: Mesh
    step: int
    params: Any

    def corpus(self) -> Corpus:
        return open_corpus(self.config.data)


def open_run(parser: argparse.ArgumentParser, argv: list[str]) -> Run:
    """Parses a command line with --workdir, --step and --config.FIELD=VALUE, and restores that checkpoint.

    Raises:
      UsageError: there is no such run or checkpoint, or the overrides do not fit it.
    """
    arguments, overrides = split_overrides(argv)
    return restore_run(**vars(parser.parse_args(arguments)), overrides=overrides)


def restore_run(workdir: str | Path, step: int | None = None, overrides: list[str] | None = None, **_: Any) -> Run:
    """Restores checkpoint `step` of a run, or its newest sound one, with its config changed by `overrides`."""
    enable_compilation_cache()
    workdir = Path(workdir).expanduser().absolute()
    checkpoints, meta = _open_checkpoints(workdir, step)
    config = _config(meta, overrides or [])
    mesh = make_mesh(1, jax.devices()[:1])
    restored = _restore(checkpoints, step, _abstract_state(config, mesh, meta))
    return Run(workdir, config, mesh, restored.step, weights(restored.state))


def saved_config(workdir: str | Path, *, field: str) -> RunConfig:
    """Returns the config with which a run saved its newest sound checkpoint.

    Args:
      field: what names the run, such as "config.init_from", for the message.
    Raises:
      UsageError: there is no such run or checkpoint.
    """
    checkpoints, meta = _open_checkpoints(Path(workdir).expanduser().absolute(), None, field)
    checkpoints.close()
    return _config(meta)


def restore_params(workdir: str | Path, abstract_params: Any, step: int | None = None) -> Any:
    """Restores the weights of a run for another model, whose parameters `abstract_params` describes.

    Args:
      abstract_params: ShapeDtypeStructs; each weight is restored onto the sharding of its own.
    Raises:
      UsageError: there is no such run or checkpoint, or its model has other parameters.
    """
    checkpoints, meta = _open_checkpoints(Path(workdir).expanduser().absolute(), step)
    config = _config(meta)
    sharding = jax.tree.leaves(abstract_params)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else make_mesh(1, jax.devices()[:1])
    # What else that run saved goes onto this mesh too, over which its batch need not divide.
    rows = mesh.shape["data"] * config.optimizer.accumulation_steps
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))
    abstract = _abstract_state(config, mesh, meta)
    _check_same_parameters(abstract.params, abstract_params, workdir)
    abstract = abstract.replace(params=abstract_params, ema=abstract_params if abstract.ema else ())
    return weights(_restore(checkpoints, step, abstract).state)


def _open_checkpoints(
    workdir: Path, step: int | None, field: str = "--workdir"
) -> tuple[Checkpoints, dict[str, Any]]:
    if not (workdir / "checkpoints").is_dir():
        raise UsageError(f"{field}={workdir}: no run has saved a checkpoint there; "
                         f"train one with python -m experiments.train --config=quickstart --workdir={workdir}")
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    return checkpoints, checkpoints.read_meta(step)


def _config(meta: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    return apply_overrides(config_from_saved(meta["config"], RunConfig), overrides)


def _abstract_state(config: RunConfig, mesh: Mesh, meta: dict[str, Any]) -> TrainState:
    with use_mesh(mesh):
        abstract = compile_program(config, mesh).abstract_state
    return abstract.replace(opt_state=(), ema=()) if meta.get("contents") == PARAMETERS_ONLY else abstract


def _restore(checkpoints: Checkpoints, step: int | None, abstract: TrainState) -> Restored:
    restored = checkpoints.restore_latest(abstract) if step is None else checkpoints.restore_step(step, abstract)
    checkpoints.close()
    assert restored is not None, "its meta was read"
    return restored


def _check_same_parameters(saved: Any, wanted: Any, workdir: str | Path) -> None:
    misfit = first_misfit(array_types(saved), array_types(wanted))
    if misfit:
        raise UsageError(f"the model of {workdir} does not fit this one: {misfit}; "
                         "change config.model, or start from another run")


def open_corpus(data: DataConfig) -> Corpus:
    return load_corpus(data.source, text_key=data.text_key, cache_dir=data.cache_dir)


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless jax was told another place."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "hnet-jax" / "compiled"))
