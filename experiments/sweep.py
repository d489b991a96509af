"""Trains several configs with several seeds, and writes one table and one plot of the results.

  python -m experiments.sweep --configs=compare_learned,compare_stride --seeds=3 --outdir=runs/compare

Every run is an `experiments.train` of its own in OUTDIR/<config>-seed<k>/; --config.FIELD=VALUE holds for all of
them. The same command again leaves finished runs alone and trains the others. OUTDIR/ gets sweep.json (every
run), table.md (a row per config) and plot.svg. A run that fails is reported, the others continue, and the exit
code is 1. SIGTERM and Ctrl-C stop the runs, which save a checkpoint each.
"""
import contextlib
import dataclasses
import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from experiments import commands
from experiments.analysis.flops import model_flops_per_byte
from experiments.config import RunConfig
from experiments.config.codec import flat_fields
from experiments.config.command_line import split_overrides
from experiments.config.files import config_from_json, load_config
from experiments.errors import RunError, UsageError, run_command
from experiments.pages.sweep import BITS, Result, render_plot, render_table, tokens_per_chunk
from experiments.runs.grid import write_findings
from experiments.runs.manifest import prepare_workdir
from experiments.runs.metrics import read_metrics

POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A training run that the sweep wants."""

    name: str            # of its config
    seed: int
    config: RunConfig
    workdir: Path
    arguments: list[str]  # of experiments.train

    def __str__(self) -> str:
        return f"{self.name} seed {self.seed}"


def main(argv: list[str]) -> int:
    parser = commands.parser(__doc__, "sweep")
    parser.add_argument("--configs", required=True, help="names in configs/ or paths of config files, with commas")
    parser.add_argument("--seeds", type=int, default=3, help="run seeds 0 to this - 1 of every config")
    parser.add_argument("--outdir", required=True, help="the directory of the runs, the table and the plot")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the devices here")
    parser.add_argument("--report_only", action="store_true", help="train nothing, draw what is finished")
    arguments, overrides = split_overrides(argv)
    arguments = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name}={getattr(arguments, name)} must be at least 1")
    outdir = Path(arguments.outdir).expanduser()
    runs = plan(arguments.configs.split(","), arguments.seeds, outdir, overrides)
    failed: list[Run] = []
    if not arguments.report_only:
        prepare_workdir(arguments.outdir)
        with _stop_signals() as received:
            failed = train_all(runs, arguments.jobs, received)
            if received:
                name = signal.Signals(received[0]).name
                print(f"stopped by {name}; the same command continues from there", flush=True)
                return 128 + received[0]
    finished = {run: result_of(run) if is_finished(run) else None for run in runs}
    write_findings(outdir, finished, "sweep.json", lambda results: (render_table(results), render_plot(results)))
    return 1 if failed else 0


def plan(configs: list[str], num_seeds: int, outdir: Path, overrides: list[str]) -> list[Run]:
    """Returns all runs of a sweep, config by config.

    Raises:
      UsageError: a config does not load, two have one name, or a run in `outdir` was made with another config.
    """
    if any(override.startswith("--config.seed=") for override in overrides):
        raise UsageError("--config.seed is what a sweep varies; use --seeds=N for seeds 0 to N - 1")
    names = [Path(config).stem for config in configs]
    if len(set(names)) < len(names):
        raise UsageError(f"--configs={','.join(configs)}: two configs have one name, and so would their runs")
    runs = []
    for name, config in zip(names, configs, strict=True):
        for seed in range(num_seeds):
            settings = [*overrides, f"--config.seed={seed}"]
            workdir = outdir / f"{name}-seed{seed}"
            runs.append(Run(name, seed, load_config(config, settings, RunConfig), workdir,
                            [f"--config={config}", f"--workdir={workdir}", *settings]))
    for run in runs:
        _refuse_another_config(run)
    return runs


def train_all(runs: list[Run], jobs: int, received: list[int]) -> list[Run]:
    """Trains what is not finished, `jobs` runs at a time, until a signal is in `received`; returns what failed."""
    waiting, running, failed = [], [], []
    for number, run in enumerate(runs, start=1):
        label = f"[{number}/{len(runs)}] {run}"
        if is_finished(run):
            print(f"{label}: finished before, {_outcome(run)}", flush=True)
        else:
            waiting.append((label, run))
    was_stopped = False
    while running or (waiting and not received):
        while waiting and len(running) < jobs and not received:
            label, run = waiting.pop(0)
            try:
                running.append(_Child(label, run))
            except RunError as error:
                print(f"{label}: FAILED to start: {error}", flush=True)
                failed.append(run)
        if received and not was_stopped:
            print(f"stopping {len(running)} runs; each saves a checkpoint first", flush=True)
            for child in running:
                child.process.terminate()
            was_stopped = True
        time.sleep(POLL_SECONDS)
        ended = [child for child in running if child.process.poll() is not None]
        running = [child for child in running if child not in ended]
        failed += [child.run for child in ended if not child.report(was_stopped)]
    return failed


class _Child:
    """A training process, with its output in its workdir."""

    def __init__(self, label: str, run: Run) -> None:
        self.label, self.run, self._started = label, run, time.monotonic()
        run.workdir.mkdir(parents=True, exist_ok=True)
        self._log = run.workdir / "train.log"
        with self._log.open("a") as log:
            # The lock is held as long as a process has this file open, the child's included: a run that outlived
            # a sweep that was killed is not joined by another in its directory.
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError("a process of an earlier sweep trains there; wait for it, or end it") from None
            self._log_start = log.tell()
            # A group of its own: Ctrl-C on the terminal would end it before it saves.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.train", *run.arguments], stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True)
        print(f"{label}: started, {self._log} has its output", flush=True)

    def report(self, was_stopped: bool) -> bool:
        """Prints how the process ended, and returns whether it trained to the end."""
        seconds = time.monotonic() - self._started
        code = self.process.returncode
        if code == 0:
            print(f"{self.label}: {_outcome(self.run)}, {seconds:.0f} s in all", flush=True)
        elif was_stopped:
            print(f"{self.label}: stopped", flush=True)
        else:
            print(f"{self.label}: FAILED with exit code {code} after {seconds:.0f} s: {self._error()}", flush=True)
        return code == 0

    def _error(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it printed nothing"])[-1]


def is_finished(run: Run) -> bool:
    """Tells whether the run reached its last step, was evaluated there, and saved its weights."""
    # The manifest gets its "end_step" after the last checkpoint; the last evaluation comes before that.
    manifest = run.workdir / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text()).get("end_step") == run.config.num_steps


def result_of(run: Run) -> Result:
    """Reads the result of a finished run."""
    manifest = json.loads((run.workdir / "manifest.json").read_text())
    evaluations = [record for record in read_metrics(run.workdir / "metrics.jsonl") if BITS in record]
    count, device = manifest["device_count"], manifest["device_kind"]
    corpus = manifest.get("corpus", {})
    bytes_per_token = corpus["bytes"] / corpus["tokens"] if "tokens" in corpus else 1
    flops_per_token = float(model_flops_per_byte(
        run.config.model, run.config.data.sequence_length, tokens_per_chunk(evaluations[-1])))
    return Result(
        config=run.name,
        seed=run.seed,
        evaluations=evaluations,
        num_params=manifest["num_params"],
        flops_per_byte=flops_per_token / bytes_per_token,
        train_seconds=manifest["train_seconds"],
        commit=manifest["git"]["commit"],
        is_dirty=manifest["git"].get("is_dirty", False),
        device=f"{count} x {device}",
        versions=manifest["versions"],
    )


def _outcome(run: Run) -> str:
    result = result_of(run)
    chunks = "".join(f", {length:.2f} bytes per chunk" for length in result.bytes_per_chunk[-1:])
    return f"{result.bits_per_byte:.3f} bits per byte{chunks}"


def _refuse_another_config(run: Run) -> None:
    path = run.workdir / "config.json"
    if not path.is_file():
        return
    # Through RunConfig, which fills in fields that were added since.
    saved = flat_fields(config_from_json(path.read_text(), RunConfig))
    wanted = flat_fields(run.config)
    if saved["data.tokenizer"] and wanted["data.tokenizer"]:  # a run names its own copy; training compares them
        del saved["data.tokenizer"], wanted["data.tokenizer"]
    for field in sorted(saved.keys() | wanted.keys()):
        if saved.get(field) != wanted.get(field):
            raise UsageError(
                f"{run.workdir} was trained with config.{field} {saved.get(field)!r}, and this sweep asks for "
                f"{wanted.get(field)!r}; use another --outdir, or delete that run")


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Lets SIGINT and SIGTERM only add to this list while training."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_command(main)
