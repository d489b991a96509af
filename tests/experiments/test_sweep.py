"""A sweep trains what is missing, survives what fails, and draws what the runs wrote, number by number."""
import json
import os
import re
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest

from experiments import sweep
from experiments.analysis.flops import model_flops_per_byte
from experiments.errors import RunError, UsageError
from tests.support.runs import config_of, finish, results, saved_steps, start


def _arguments(configs: Path, outdir: Path, *names: str, seeds: int = 1) -> list[str]:
    paths = ",".join(str(configs / f"{name}.py") for name in names)
    return [f"--configs={paths}", f"--seeds={seeds}", f"--outdir={outdir}"]


@pytest.fixture(scope="module")
def swept(configs, finished_run, compilation_cache, tmp_path_factory) -> tuple[Path, str]:
    """The outdir and the output of a sweep over two configs and two seeds.

    One run is finished before, one is to be trained, and those of lost.py find no text.
    """
    outdir = tmp_path_factory.mktemp("sweep")
    shutil.copytree(finished_run, outdir / "tiny-seed0")
    text = (configs / "tiny.py").read_text()
    (configs / "lost.py").write_text(re.sub('source="files:.*?"', 'source="files:/nowhere/*.txt"', text))
    stdout, stderr = finish(
        start("sweep", *_arguments(configs, outdir, "lost", "tiny", seeds=2), "--jobs=2",
              cache=compilation_cache), code=1)
    assert stderr == ""
    return outdir, stdout


def _finished(swept, tmp_path: Path) -> Path:
    return shutil.copytree(swept[0], tmp_path / "copy")


# Training


def test_runs_that_fail_are_reported_with_their_error_and_the_others_go_on(swept):
    _, stdout = swept
    for index in range(2):
        [failure] = re.findall(
            rf"^\[{index + 1}/4\] lost seed {index}: FAILED with exit code 2 after \d+ s: (.*)$", stdout, re.M)
        assert failure.startswith("error: ") and "no file matches '/nowhere/*.txt'" in failure
    assert re.search(r"^\[3/4\] tiny seed 0: finished before, \d\.\d{3} bits per byte, \d\.\d\d", stdout, re.M)
    assert re.search(r"^\[4/4\] tiny seed 1: \d\.\d{3} bits per byte, \d\.\d\d bytes per chunk", stdout, re.M)
    assert "not finished and left out: lost seed 0, lost seed 1\n" in stdout


def test_the_same_command_trains_only_what_is_missing(swept, configs, tmp_path, monkeypatch, capsys):
    outdir = _finished(swept, tmp_path)
    started = []

    class Child:
        def __init__(self, label, run):
            started.append(f"{run}: {' '.join(run.arguments)}")
            raise RunError("not in this test")

    monkeypatch.setattr(sweep, "_Child", Child)
    shutil.rmtree(outdir / "tiny-seed0")
    assert sweep.main(_arguments(configs, outdir, "tiny", seeds=2)) == 1
    [only] = started
    assert re.fullmatch(r"tiny seed 0: --config=\S+/tiny.py --workdir=\S+/tiny-seed0 --config.seed=0", only)
    assert capsys.readouterr().out.count(": finished before, ") == 1


def test_a_run_that_did_not_save_its_last_step_is_not_finished(swept, configs, tmp_path):
    outdir = _finished(swept, tmp_path)
    run = sweep.plan([str(configs / "tiny.py")], 1, outdir, [])[0]
    assert sweep.is_finished(run)
    manifest = json.loads((run.workdir / "manifest.json").read_text())
    (run.workdir / "manifest.json").write_text(json.dumps(manifest | {"end_step": 1}))
    assert not sweep.is_finished(run)


def _train_by(script: str, path: Path, monkeypatch) -> None:
    """Lets the sweep start this shell script instead of python -m experiments.train."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sweep.sys, "executable", str(path))


@pytest.mark.parametrize(("output", "reported"), [
    ("compiling\nerror: the loss is nan\nWARNING: bye\n", "error: the loss is nan"),
    ("Traceback\n  File x\nValueError: no\n\n", "ValueError: no"),
    ("", "it printed nothing"),
])
def test_a_failure_is_told_by_its_error_or_else_its_last_line(
    configs, tmp_path, monkeypatch, capsys, output, reported
):
    [run] = sweep.plan([str(configs / "tiny.py")], 1, tmp_path, [])
    run.workdir.mkdir()
    (run.workdir / "train.log").write_text("error: of an earlier attempt\n")
    _train_by(f"printf '{output}'; exit 7", tmp_path / "train", monkeypatch)
    assert sweep.train_all([run], 1, []) == [run]
    assert re.search(rf": FAILED with exit code 7 after 0 s: {reported}$", capsys.readouterr().out, re.M)


def test_a_run_is_not_joined_while_another_process_trains_it(configs, tmp_path, monkeypatch, capsys):
    [run] = sweep.plan([str(configs / "tiny.py")], 1, tmp_path, [])
    _train_by("exec sleep 60", tmp_path / "train", monkeypatch)
    orphan = sweep._Child("first", run)
    try:
        assert os.getpgid(orphan.process.pid) != os.getpgid(0)  # else Ctrl-C on a terminal would reach it
        assert sweep.train_all([run], 1, []) == [run]
        assert "FAILED to start: a process of an earlier sweep trains there" in capsys.readouterr().out
    finally:
        orphan.process.kill()
        orphan.process.wait()
    _train_by("exit 7", tmp_path / "train", monkeypatch)
    assert sweep._Child("again", run).process.wait() == 7  # the lock ended with the process


def test_ctrl_c_stops_the_runs_with_a_checkpoint_each(configs, tmp_path, compilation_cache):
    process = start(
        "sweep", *_arguments(configs, tmp_path, "isotropic"), "--config.num_steps=100000",
        "--config.eval_every=100000", cache=compilation_cache)
    log = tmp_path / "isotropic-seed0" / "train.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "step " in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, _ = finish(process, code=130)
    assert "[1/1] isotropic seed 0: stopped\nstopped by SIGINT; the same command continues from there\n" in stdout
    assert "stopped by SIGTERM at step" in log.read_text()
    assert saved_steps(log.parent)


def test_sigterm_stops_all_runs_and_starts_no_other(configs, tmp_path, monkeypatch, capsys):
    _train_by("trap 'echo saved; exit 143' TERM\nwhile :; do sleep 0.05; done", tmp_path / "train", monkeypatch)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert sweep.main([*_arguments(configs, tmp_path / "out", "tiny", seeds=3), "--jobs=2"]) == 143
    logs = sorted((tmp_path / "out").glob("*/train.log"))
    assert [log.read_text() for log in logs] == ["saved\n"] * 2
    assert "stopping 2 runs; each saves a checkpoint first" in capsys.readouterr().out


# Results


def test_the_results_are_those_that_the_runs_logged(swept, configs):
    outdir, stdout = swept
    records = json.loads((outdir / "sweep.json").read_text())
    assert [(record["config"], record["seed"]) for record in records] == [("tiny", 0), ("tiny", 1)]
    for record in records:
        workdir = outdir / f"{record['config']}-seed{record['seed']}"
        logged = [line for line in results(workdir) if "eval/bits_per_byte" in line]
        assert record["evaluations"] == logged and logged[-1]["step"] == 20
        assert json.loads((workdir / "config.json").read_text())["seed"] == record["seed"]
        config, last = config_of(configs / f"{record['config']}.py"), logged[-1]
        realised = (1 / last["eval/stage0/boundary_rate"],)
        assert record["flops_per_byte"] == model_flops_per_byte(config.model, 32, realised)
    table = (outdir / "table.md").read_text()
    assert table in stdout
    tiny = [record["evaluations"][-1] for record in records]
    bits = [last["eval/bits_per_byte"] for last in tiny]
    chunks = [last["eval/stage0/bytes_per_chunk"] for last in tiny]
    row = next(line for line in table.splitlines() if line.startswith("| tiny "))
    assert [cell.strip() for cell in row.split("|")[2:5]] == [
        "2", f"{statistics.mean(bits):.3f} ± {statistics.stdev(bits):.3f}", f"{statistics.mean(chunks):.2f}"]


def test_report_only_draws_the_same_without_training(swept, configs, tmp_path, monkeypatch):
    outdir = _finished(swept, tmp_path)
    before = {name: (outdir / name).read_text() for name in ("sweep.json", "table.md", "plot.svg")}
    for name in before:
        (outdir / name).unlink()
    monkeypatch.setattr(sweep, "train_all", None)
    assert sweep.main([*_arguments(configs, outdir, "lost", "tiny", seeds=2), "--report_only"]) == 0
    assert {name: (outdir / name).read_text() for name in before} == before


# Refusals


@pytest.mark.parametrize(("change", "message"), [
    (["--seeds=0"], "--seeds=0 must be at least 1"),
    (["--jobs=0"], "--jobs=0 must be at least 1"),
    (["--config.seed=3"], "--config.seed is what a sweep varies; use --seeds=N"),
    (["--configs=quickstart,quickstrat"], "did you mean 'quickstart'?"),
    (["--configs=quickstart,configs/quickstart.py"], "two configs have one name"),
    (["--configs=quickstart", "--config.num_stepz=1"], "config has no field 'num_stepz'"),
])
def test_a_sweep_refuses_before_it_trains(configs, tmp_path, change, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        sweep.main([*_arguments(configs, tmp_path / "out", "tiny"), *change])
    assert not (tmp_path / "out").exists()


def test_runs_of_another_config_are_not_mixed_in(swept, configs):
    arguments = _arguments(configs, swept[0], "tiny", seeds=2)
    with pytest.raises(UsageError, match=r"tiny-seed0 was trained with config\.num_steps 20, and this .* for 3;"):
        sweep.main([*arguments, "--config.num_steps=3", "--report_only"])


def test_there_is_no_table_of_nothing(configs, tmp_path):
    with pytest.raises(RunError, match="none of the 1 runs is finished"):
        sweep.main([*_arguments(configs, tmp_path, "tiny"), "--report_only"])
