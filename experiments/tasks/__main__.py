"""Trains several mixers on a synthetic task, and writes one table and one plot of the results.

  python -m experiments.tasks --config=mqar_tiny --mixers=t,m --seeds=1 --outdir=runs/mqar
  python -m experiments.tasks longcontext --workdir=RUN      tests of a trained model instead: longcontext --help

--config names a file in configs/tasks/, whose fields --config.FIELD=VALUE changes. A mixer is a layout such as t2,
gdn2 or m1t1; a name without a count gets as many layers as the config says. Every mixer is trained with every
learning rate of the config and seeds 0 to N - 1, one run after the other.

OUTDIR/ gets runs/ (a file per finished run), results.json (all of them), table.md (a row per mixer, with its best
learning rate) and plot.svg. The same command again leaves finished runs alone and trains the others. A run
that fails is reported, the others continue, and the exit code is 1.
"""
import dataclasses
import functools
import math
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import commands
from experiments.config.command_line import split_overrides
from experiments.config.files import CONFIGS_DIRECTORY, load_config, saved_fields
from experiments.errors import UsageError, run_command, suggest
from experiments.runs.compilation_cache import enable_compilation_cache
from experiments.runs.grid import save_result, write_findings
from experiments.runs.manifest import prepare_workdir, write_manifest
from experiments.runs.progress import Progress
from experiments.tasks.config import TaskConfig
from experiments.tasks.longcontext import command as longcontext
from experiments.tasks.page import choose_rates, render_plot, render_table
from experiments.tasks.results import Result, RunName, load
from experiments.tasks.settings import Column, Setting, settings_of
from experiments.tasks.training import Trainer, symbols_per_second

SUITES = {"longcontext": longcontext.main}
UPDATES = 5  # lines about a run on a console that is not a terminal


class Run(NamedTuple):
    """A training run that the experiment wants."""

    name: RunName
    setting: Setting


def main(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        if argv[0] not in SUITES:
            raise UsageError(f"{argv[0]!r} is no suite of tests{suggest(argv[0], SUITES)}; there is "
                             f"{', '.join(SUITES)}, and --config=NAME trains on a task")
        return SUITES[argv[0]](argv[1:])
    parser = commands.parser(__doc__, "tasks")
    parser.add_argument("--config", required=True, help="a name in configs/tasks/ or the path of a config file")
    parser.add_argument("--mixers", default="", help="layouts, with commas; those of the config by default")
    parser.add_argument("--seeds", type=int, default=1, help="train with seeds 0 to this - 1")
    parser.add_argument("--outdir", required=True, help="the directory of the results, the table and the plot")
    parser.add_argument("--report_only", action="store_true", help="train nothing, draw what is finished")
    arguments, overrides = split_overrides(argv)
    arguments = parser.parse_args(arguments)
    if arguments.seeds < 1:
        raise UsageError(f"--seeds={arguments.seeds} must be at least 1")
    config = _config(arguments.config, arguments.mixers, overrides)
    outdir = Path(arguments.outdir).expanduser()
    runs = plan(config, arguments.seeds)
    finished = {run.name: load(run.name, outdir, config) for run in runs}
    failed = 0
    if not arguments.report_only:
        outdir = prepare_workdir(arguments.outdir)
        enable_compilation_cache()
        try:
            failed = train_all(runs, finished, config, outdir)
        except KeyboardInterrupt:
            print("stopped; the same command continues with the runs that are not finished", flush=True)
            return 128 + signal.SIGINT
    columns = _columns(runs)
    write_findings(outdir, finished, "results.json", lambda results: _render(results, columns))
    return 1 if failed else 0


def plan(config: TaskConfig, num_seeds: int) -> list[Run]:
    """Returns all runs of an experiment: those that share compiled programs follow one another.

    Raises:
      UsageError: the data that the config describes cannot be made.
    """
    try:
        settings = [settings_of(config, seed) for seed in range(num_seeds)]
    except ValueError as error:
        raise UsageError(f"config.data: {error}") from error
    return [
        Run(RunName(mixer, settings[seed][index].name, seed, rate), settings[seed][index])
        for mixer in config.mixers for index in range(len(settings[0])) for seed in range(num_seeds)
        for rate in config.learning_rates]


def train_all(
    runs: list[Run], finished: dict[RunName, Result | None], config: TaskConfig, outdir: Path
) -> int:
    """Trains what is not `finished`, adds it there, and returns how many runs failed."""
    if all(finished.values()):
        print("all runs were finished before", flush=True)
        return 0
    manifest, num_failed = write_manifest(outdir, config=saved_fields(config)), 0
    speed = symbols_per_second(runs[0].setting.sources[0], config.batch_size)
    print(f"{config.task}: {len(runs)} runs; their data is made at {speed / 1e6:.2f} M symbols/s", flush=True)
    # The same setting under another seed is equal, and so are its programs, unless the grammar is another.
    trainer_of = functools.lru_cache(maxsize=1)(functools.partial(Trainer, config))
    for number, run in enumerate(runs, start=1):
        label = f"[{number}/{len(runs)}] {run.name}"
        if finished[run.name]:
            print(f"{label}: finished before, {finished[run.name].summary}", flush=True)
            continue
        try:
            result = train(trainer_of(run.name.mixer, run.setting), run.name, manifest, label)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            print(f"{label}: FAILED: {error}", flush=True)
            num_failed += 1
            continue
        save_result(result, outdir)
        finished[run.name] = result
        print(f"{label}: {result.summary}; {result.train_seconds:.0f} s", flush=True)
    return num_failed


def train(trainer: Trainer, name: RunName, manifest: dict[str, Any], label: str) -> Result:
    """Trains and tests one run, with its progress on the console."""
    config, curve, seconds, diverged_at = trainer.config, [], 0.0, 0
    update_every = max(1, config.num_steps // config.steps_per_call // UPDATES)
    with Progress(config.num_steps) as progress:
        progress.message(f"{label}: started, {trainer.num_params:,} parameters")
        before = time.perf_counter()
        for state, measured in trainer.train(name.seed, name.learning_rate):  # noqa: B007
            now = time.perf_counter()
            if curve:  # the first call compiles
                seconds += now - before
            before = now
            curve.append(measured)
            if len(curve) % update_every == 0:
                progress.update(measured.step, {"loss": measured.loss_nats, "right": measured.accuracy})
    if not math.isfinite(curve[-1].loss_nats):
        diverged_at = curve.pop().step
    validation, test = (trainer.accuracies(state, name.seed, split) for split in ("validation", "test"))
    if diverged_at:
        validation, test = dict.fromkeys(validation, 0.0), dict.fromkeys(test, 0.0)
    return Result(
        mixer=name.mixer, setting=name.setting, seed=name.seed, learning_rate=name.learning_rate,
        validation=validation, test=test, curve=curve, diverged_at=diverged_at, num_params=trainer.num_params,
        train_seconds=seconds, commit=manifest["git"]["commit"], is_dirty=manifest["git"].get("is_dirty", False),
        device=manifest["device_kind"], versions=manifest["versions"], config=saved_fields(config))


def _config(name: str, mixers: str, overrides: list[str]) -> TaskConfig:
    config = load_config(name, overrides, TaskConfig, directory=CONFIGS_DIRECTORY / "tasks")
    try:
        return dataclasses.replace(config, mixers=tuple(mixers.split(","))) if mixers else config
    except ValueError as error:
        raise UsageError(f"--mixers={mixers}: {error}") from error


def _render(results: list[Result], columns: list[Column]) -> tuple[str, str]:
    chosen = choose_rates(results)
    return render_table(chosen, columns), render_plot(chosen, columns)


def _columns(runs: list[Run]) -> list[Column]:
    """Returns the columns of all settings, each once: those of another seed have the same names."""
    return list({column.name: column for run in runs for column in run.setting.columns}.values())


if __name__ == "__main__":
    run_command(main)
