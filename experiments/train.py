"""Trains a model. The same command again continues from the newest checkpoint.

  python -m experiments.train --config=quickstart --workdir=runs/x --config.optimizer.peak_lr=1e-3

A run directory holds config.json, manifest.json, metrics.jsonl, checkpoints/, tb/ and report.html, besides
tokenizer.json for a model of tokens. SIGTERM saves a checkpoint and exits with 143, so that a launcher can tell a
preempted run from a finished one.
"""
import contextlib
import dataclasses
import itertools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import jax

from experiments import commands
from experiments.config import RunConfig
from experiments.config.command_line import split_overrides
from experiments.config.files import load_config, saved_fields
from experiments.errors import UsageError, run_command
from experiments.evaluate import make_evaluate
from experiments.runs.announcement import announce_run
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.compilation_cache import enable_compilation_cache
from experiments.runs.manifest import prepare_workdir, update_manifest
from experiments.runs.metrics import MetricsWriter
from experiments.runs.progress import Progress
from experiments.runs.saved_run import start_or_resume
from experiments.runs.step_log import StepLog
from experiments.training.batches import open_data
from experiments.training.loop import steps
from experiments.training.mesh import batch_placer, make_mesh, use_mesh
from experiments.training.step import compile_program, weights

SIGTERM_EXIT = 143  # 128 + SIGTERM, as a shell reports it


def main(argv: list[str]) -> int:
    parser = commands.parser(__doc__, "train")
    parser.add_argument("--config", required=True, help="a name in configs/, or the path of a config file")
    parser.add_argument("--workdir", required=True, help="the run directory; an existing run is resumed")
    arguments, overrides = split_overrides(argv)
    arguments = parser.parse_args(arguments)
    config = load_config(arguments.config, overrides, RunConfig)
    for index, stage in enumerate(config.model.stages[:-1]):
        if stage.chunking.router == "given":
            raise UsageError(
                f"config.model.stages.stage{index}.chunking.router 'given' needs boundary_levels in every batch, "
                "which no data source here has; train it from Python, with step.compile_program")
    return train(config, prepare_workdir(arguments.workdir))


def train(config: RunConfig, workdir: Path) -> int:
    """Runs `config` to its last step, from wherever `workdir` is, and returns the exit code."""
    enable_compilation_cache()
    data = open_data(config, workdir)
    if config.data.tokenizer:  # the run keeps a copy, which is its own wherever the run is moved
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="tokenizer.json"))
    mesh = make_mesh(config.model_axis)
    place = batch_placer(mesh)
    with (
        use_mesh(mesh), _sigterm_noted() as stop,
        Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints) as checkpoints,
    ):
        program = compile_program(config, mesh)
        state, seconds = start_or_resume(config, program, checkpoints, data.corpus)
        evaluate = make_evaluate(config, data.held_out, place)
        start = step = int(state.step)
        announce_run(config, workdir, data, state)
        meta = {"config": saved_fields(config), "corpus": data.corpus.fingerprint}
        with (
            MetricsWriter(workdir) as writer, Progress(config.num_steps, start) as progress,
            contextlib.closing(steps(program, state, data.batches, place)) as training,
        ):
            writer.truncate_after(start)
            if start < config.num_steps:
                progress.message("compiling the train step ...")
            log = StepLog(config, writer, progress, checkpoints, seconds)
            for step, state, metrics in itertools.islice(training, config.num_steps - start):
                log.add(step, metrics)
                stops = stop.is_set()  # asked once: a signal from here on must not skip the save
                is_last = step == config.num_steps
                evaluates = is_last or step % config.eval_every == 0
                saves = is_last or step % config.checkpoint_every == 0 or stops
                if evaluates or saves:
                    log.catch_up()  # raises at what must not be saved
                    with log.paused():
                        if evaluates:
                            log.add_evaluation(step, evaluate(weights(state)), data.held_out.num_bytes)
                        if saves:
                            seconds = log.seconds
                            checkpoints.save(step, state, meta | {"train_seconds": seconds})
                if stops:
                    break
    if step < config.num_steps:
        print(f"stopped by SIGTERM at step {step}; the same command continues from there", flush=True)
        return SIGTERM_EXIT
    update_manifest(workdir, end_step=config.num_steps, train_seconds=round(seconds, 1))
    if config.report and jax.process_index() == 0:
        from experiments.report import write_report
        print(f"report: {write_report(workdir)}", flush=True)
    return 0


@contextlib.contextmanager
def _sigterm_noted() -> Iterator[threading.Event]:
    """Lets SIGTERM only set this event while training, and end the process as ever afterwards."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    run_command(main)
