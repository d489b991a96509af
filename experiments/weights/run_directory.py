"""A run at step 0 made of imported weights: other runs may start from it, but it cannot be trained on."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.config import DataConfig, RunConfig
from experiments.config.files import config_to_json, saved_fields
from experiments.errors import UsageError
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.manifest import prepare_workdir, write_manifest
from experiments.runs.saved_run import PARAMETERS_ONLY
from experiments.training.step import TrainState
from hnet import HNetConfig


def refuse_taken(out: Path) -> None:
    """Raises UsageError if the run directory has checkpoints."""
    if (out / "checkpoints").exists():
        raise UsageError(f"{out} has checkpoints already; name another directory")


def write_run(
    out: Path, model: HNetConfig, params: Any, data: DataConfig, *, source: Path,
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes `out` as a run at step 0.

    Args:
      source: the file or directory that the weights are from, for the manifest.
      files: texts to write beside config.json, by name.
    """
    refuse_taken(out)
    workdir = prepare_workdir(out)
    run = RunConfig(model=model, data=data, tokens_per_chunk=paper_tokens_per_chunk(len(model.stages) - 1))
    for name, text in (files or {}).items():
        (workdir / name).write_text(text, encoding="utf-8")
    (workdir / "config.json").write_text(config_to_json(run) + "\n")
    write_manifest(workdir, num_params=count_params(params), imported_from=str(source.absolute()))
    meta = {"config": saved_fields(run), "contents": PARAMETERS_ONLY}
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.save(0, TrainState(jnp.zeros((), jnp.int32), params, opt_state=()), meta)
    checkpoints.close()


def count_params(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def describe_layout(model: HNetConfig) -> str:
    """Returns such as "m4[T22]m4, widths 1024, 1536"."""
    layout = model.stages[-1].encoder
    for stage in reversed(model.stages[:-1]):
        layout = f"{stage.encoder}[{layout}]{stage.decoder}"
    return f"{layout}, widths {', '.join(str(stage.stack.width) for stage in model.stages)}"


def paper_tokens_per_chunk(num_chunking: int) -> tuple[float, ...]:
    """Returns the compression that the released models aimed at: 6 with one chunking stage, 3 and 3 with two."""
    return (6.0,) if num_chunking == 1 else (3.0,) * num_chunking
