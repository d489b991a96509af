"""A run on disk, opened again by the commands that look at it: its config, its parameters, its corpus."""
import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from experiments.checkpoints import Checkpoints
from experiments.config import DataConfig, RunConfig
from experiments.config_loading import apply_overrides, config_from_json, split_overrides
from experiments.data import Corpus, load_corpus
from experiments.errors import UsageError
from experiments.mesh import make_mesh, use_mesh
from experiments.train_step import compile_program
from hnet import HNetConfig


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
    workdir = Path(workdir).expanduser().absolute()
    if not (workdir / "checkpoints").is_dir():
        raise UsageError(f"--workdir={workdir}: no run has saved a checkpoint there; "
                         "train one with python -m experiments.train --config=quickstart --workdir=...")
    enable_compilation_cache()
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    meta = checkpoints.read_meta(step)
    saved = config_from_json(json.dumps(meta["config"]))
    config = RunConfig.from_config_dict(apply_overrides(saved, overrides or []))
    mesh = make_mesh(1, jax.devices()[:1])
    with use_mesh(mesh):
        abstract = compile_program(config, mesh).abstract_state
        restored = (checkpoints.restore_latest(abstract) if step is None
                    else checkpoints.restore_step(step, abstract))
    checkpoints.close()
    return Run(workdir, config, mesh, restored.step, restored.state.params)


def open_corpus(data: DataConfig) -> Corpus:
    return load_corpus(data.source, text_key=data.text_key, cache_dir=data.cache_dir)


def evaluation_config(model: HNetConfig) -> HNetConfig:
    """The same model with full chunk capacity, so that no boundary is ever demoted."""
    stages = tuple(dataclasses.replace(stage, capacity=1.0) for stage in model.stages)
    return dataclasses.replace(model, stages=stages)


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless jax was told another place."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "hnet-jax" / "compiled"))
