"""A tiny run for the tests of the commands, and functions that start them as a user does."""
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from experiments.config import RunConfig
from experiments.config.files import load_config
from experiments.data import BatchSource, WindowSource
from experiments.errors import UsageError
from experiments.training.batches import open_corpus
from experiments.training.mesh import batch_sharding, put_batch, use_mesh
from experiments.training.step import TrainState, compile_program
from tests.support.assertions import OTHER_DEVICES

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_STEPS = 20
KEPT_STEPS = (10, 15, 20)  # checkpoints of a finished run

# Attention compiles in a third of the time of Mamba-2; these tests do not depend on the mixer.
CONFIG = """
from experiments.config import DataConfig, OptimizerConfig, RunConfig
from hnet import AttentionConfig, ChunkingConfig, HNetConfig, StackConfig, StageConfig

def get_config():
    attention = AttentionConfig(num_heads=2, rotary_width=8)
    stages = (
        StageConfig(
            stack=StackConfig(width=16, attention=attention), encoder="t1", decoder="t1",
            chunking=ChunkingConfig(capacity=0.75)),
        StageConfig(stack=StackConfig(width=32, attention=attention), encoder="t1"),
    )
    return RunConfig(
        model=HNetConfig(stages=stages),
        data=DataConfig(
            source="files:{directory}/text/*.txt", cache_dir="{directory}/cache", sequence_length=32,
            batch_size=8),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=5), num_steps={num_steps}, tokens_per_chunk=(4.0,),
        log_every=1, eval_every=8, eval_bytes=2000, checkpoint_every=5, report=False,
    )
"""
ISOTROPIC_CONFIG = """
from experiments.config import DataConfig, RunConfig
from hnet import AttentionConfig, HNetConfig, StackConfig, StageConfig

def get_config():
    stack = StackConfig(width=16, attention=AttentionConfig(num_heads=2, rotary_width=8))
    stage = StageConfig(stack=stack, encoder="t1")
    return RunConfig(
        model=HNetConfig(stages=(stage,)), tokens_per_chunk=(), num_steps=1, eval_bytes=2000,
        data=DataConfig(
            source="files:{directory}/text/*.txt", cache_dir="{directory}/cache", sequence_length=32))
"""


TWO_STAGE_CONFIG = ISOTROPIC_CONFIG.replace("stages=(stage,)), tokens_per_chunk=()", """stages=(
        dataclasses.replace(stage, decoder="t1"), dataclasses.replace(stage, decoder="t1"), stage)),
        tokens_per_chunk=(2.0, 2.0)""").replace("\nfrom", "\nimport dataclasses\nfrom", 1)


def write_corpus(directory: Path, *, seed: int = 0) -> None:
    """Writes thirty short texts of a few words into directory/text."""
    words = ["the", "of", "chunk", "byte", "model", "return", "self", "import", "=", "grün", "\n"]
    draw = random.Random(seed)
    (directory / "text").mkdir(parents=True)
    for index in range(30):
        text = " ".join(draw.choices(words, k=300))
        (directory / "text" / f"{index}.txt").write_text(text, encoding="utf-8")


def start(program: str, *arguments: str | Path, cache: Path, quick: bool = True) -> subprocess.Popen:
    """Starts `python -m experiments.<program>`, or the source text of a program, on one CPU device.

    Args:
      cache: the directory of compiled programs.
      quick: skip most compiler optimisations, which halves the time to compile.
    """
    what = ["-c", program] if "\n" in program else ["-m", f"experiments.{program}"]
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quick)),
    }
    return subprocess.Popen(
        [sys.executable, *what, *map(str, arguments)], cwd=REPOSITORY, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, *, code: int = 0) -> tuple[str, str]:
    """Waits for a process to end with this exit code and returns its stdout and stderr."""
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{stdout[-3000:]}\n{stderr[-3000:]}"
    return stdout, stderr


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    """Calls a function that must refuse its arguments, and returns the one line that it says."""
    with pytest.raises(UsageError) as refused:
        function(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def results(workdir: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl without the values that depend on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def config_of(path: Path, *overrides: str) -> RunConfig:
    return load_config(str(path), [f"--config.{each}" for each in overrides], RunConfig)


def batches_of(config: RunConfig) -> BatchSource:
    data = config.data
    split = open_corpus(data).split("train")
    windows = WindowSource(split, data.sequence_length, config.seed, loss_marker=data.loss_marker)
    return BatchSource(windows, data.batch_size, seed=config.seed)


def train_here(
    config: RunConfig, mesh: Mesh, *, num_steps: int | None = None
) -> tuple[TrainState, list[dict[str, float]]]:
    """Trains in this process; returns the last state and the metrics of every step.

    Args:
      num_steps: steps to take of those of the config; None = all.
    """
    program, batches, metrics = compile_program(config, mesh), batches_of(config), []
    with use_mesh(mesh):
        state = program.init(jax.random.key(config.seed))
        for step in range(config.num_steps if num_steps is None else num_steps):
            state, values = program.step(state, put_batch(batches[step], batch_sharding(mesh)))
            metrics.append({"step": step + 1} | {name: float(value) for name, value in values.items()})
    return state, metrics


def assert_same_training(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Asserts the same steps, with losses and boundaries equal up to the order of sums."""
    for got, want in zip(actual, expected, strict=True):
        assert got.keys() == want.keys() and got["step"] == want["step"]
        for name in {"train/loss_nats", "stage0/boundary_rate", "eval/bits_per_byte"} & got.keys():
            np.testing.assert_allclose(got[name], want[name], rtol=OTHER_DEVICES, err_msg=f"step {got['step']}")
