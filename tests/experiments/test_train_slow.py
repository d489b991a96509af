"""Interruptions at moments that no test chooses, in programs compiled with all optimisations; and Mamba-2."""
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import jax
import pytest

from experiments.runs.metrics import read_metrics
from experiments.train import SIGTERM_EXIT
from experiments.training.mesh import make_mesh
from tests.support.runs import assert_same_training, config_of, finish, results, saved_steps, start, train_here

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train(tiny, compilation_cache):
    """Starts a process that trains for 60 steps and saves a checkpoint at each of them."""
    def begin(workdir: Path) -> subprocess.Popen:
        overrides = "--config.num_steps=60", "--config.checkpoint_every=1"
        return start(
            "train", f"--config={tiny}", f"--workdir={workdir}", *overrides, cache=compilation_cache, quick=False)

    return begin


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(train(workdir))
    return results(workdir)


def _last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return records[-1]["step"] if records else 0


def test_kills_at_random_moments_lose_two_steps_at_most_and_change_nothing(train, uninterrupted, tmp_path):
    draw, logged, writes_cut_off = random.Random(0), 0, 0
    for attempt in range(6):
        process = train(tmp_path)
        if attempt == 2:  # while it starts, too
            time.sleep(draw.uniform(0.5, 4))
        else:
            while _last_step(tmp_path) < logged + 3 and process.poll() is None:
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.1))
        process.kill()
        stdout, _ = finish(process, code=-signal.SIGKILL)
        resumed = re.search(r"resuming at step (\d+)", stdout)
        if attempt != 2:
            assert (int(resumed[1]) if resumed else 0) >= logged - 2
        logged = _last_step(tmp_path)
        writes_cut_off += any("tmp" in path.name for path in (tmp_path / "checkpoints").iterdir())
    assert writes_cut_off, "some kill came while a checkpoint was being written"
    finish(train(tmp_path))
    assert results(tmp_path) == uninterrupted
    assert saved_steps(tmp_path) == [58, 59, 60]


def test_sigterm_during_compilation_saves_the_first_step(train, uninterrupted, tmp_path):
    process = train(tmp_path)
    while "compiling" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    stdout, _ = finish(process, code=SIGTERM_EXIT)
    assert "stopped by SIGTERM at step 1;" in stdout
    finish(train(tmp_path))
    assert results(tmp_path) == uninterrupted


def test_mamba2_trains_on_four_by_two_devices_as_on_one(tiny):
    config = config_of(
        tiny, "model.stages.stage0.encoder=m1", "model.stages.stage0.decoder=m1",
        "model.stages.stage0.stack.recurrence.head_width=16",
        "model.stages.stage0.stack.recurrence.state_size=8")
    _, expected = train_here(config, make_mesh(1, jax.devices()[:1]))
    state, actual = train_here(config, make_mesh(2))
    assert_same_training(actual, expected)
    mixer = state.params["stage0"]["encoder"]["run0"]["mixer"]
    for name in ("x_proj", "z_proj", "dt_proj", "out"):
        kernel = mixer[name]["kernel"]
        assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 2}, name
