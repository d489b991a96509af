"""Trains a model. The same command again goes on from the newest checkpoint.

  python -m experiments.train --config=quickstart --workdir=runs/x --config.optimizer.peak_lr=1e-3

A run directory holds config.json, manifest.json, metrics.jsonl, checkpoints/, tb/ and report.html. SIGTERM saves a
checkpoint and exits with 143, so that a launcher can tell a preempted run from a finished one.
"""
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from experiments import commands
from experiments.analysis.reference_lines import corpus_reference_lines
from experiments.config import RunConfig
from experiments.config.command_line import split_overrides
from experiments.config.files import config_to_json, load_config, saved_fields
from experiments.data import BatchSource, Corpus, EvaluationSource, WindowSource, prefetch
from experiments.errors import RunError, UsageError, run_command
from experiments.evaluate import held_out, make_evaluate
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.manifest import prepare_workdir, update_manifest, write_manifest
from experiments.runs.metrics import MetricsWriter
from experiments.runs.progress import Progress
from experiments.runs.saved_run import enable_compilation_cache, open_corpus
from experiments.runs.start import start_or_resume
from experiments.training.mesh import batch_sharding, make_mesh, put_batch, use_mesh
from experiments.training.step import Program, TrainState, compile_program, weights
from experiments.training.step_problems import step_problem

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
    corpus = open_corpus(config.data)
    mesh = make_mesh(config.model_axis)
    with use_mesh(mesh), _sigterm_noted() as stop:
        program = compile_program(config, mesh)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
        data = _open_data(config, corpus)
        state, seconds = start_or_resume(config, program, checkpoints, corpus)
        start = int(state.step)
        _describe_run(config, workdir, corpus, state)
        with MetricsWriter(workdir) as writer, Progress(config.num_steps, start) as progress:
            writer.truncate_after(start)
            loop = Loop(config, mesh, program, checkpoints, data, writer, progress, stop, seconds)
            state = loop.run(state, start)
        checkpoints.close()
    if int(state.step) < config.num_steps:
        print(f"stopped by SIGTERM at step {int(state.step)}; the same command goes on from there", flush=True)
        return SIGTERM_EXIT
    update_manifest(workdir, end_step=config.num_steps, train_seconds=round(loop.seconds, 1))
    if config.report and jax.process_index() == 0:
        from experiments.report import write_report
        print(f"report: {write_report(workdir)}", flush=True)
    return 0


class Data(NamedTuple):
    corpus: Corpus
    batches: BatchSource        # to train on, by step
    held_out: EvaluationSource


def _open_data(config: RunConfig, corpus: Corpus) -> Data:
    data = config.data
    windows = WindowSource(
        corpus.split("train"), data.sequence_length, config.seed, loss_marker=data.loss_marker)
    batches = BatchSource(
        windows, data.batch_size, seed=config.seed,
        process_index=jax.process_index(), process_count=jax.process_count())
    return Data(corpus, batches, held_out(config, corpus))


class Loop:
    """The training loop: step, read the step before, and now and then evaluate, save and print."""

    def __init__(
        self, config: RunConfig, mesh: Mesh, program: Program, checkpoints: Checkpoints, data: Data,
        writer: MetricsWriter, progress: Progress, stop: threading.Event, seconds: float,
    ) -> None:
        self.config, self.program, self.checkpoints = config, program, checkpoints
        self.writer, self.progress, self.stop = writer, progress, stop
        self.batches, self.held_out = data.batches, data.held_out
        self.evaluate = make_evaluate(config, mesh)
        self.sharding = batch_sharding(mesh)
        self.meta = {"config": saved_fields(config), "corpus": data.corpus.fingerprint}
        self.seconds = seconds  # spent on steps since step 0, without evaluation and compilation
        self._interval: list[dict[str, float]] = []
        self._resumed_at = time.monotonic()

    def run(self, state: TrainState, start: int) -> TrainState:
        config, last = self.config, self.config.num_steps
        unread = None  # metrics of the latest step: read one step late, so that the device never waits
        batches = prefetch(self.batches, start)
        for step in range(start + 1, last + 1):
            if step == start + 1:
                self.progress.message("compiling the train step ...")
            state, metrics = self.program.step(state, put_batch(next(batches), self.sharding))
            if step == start + 1:
                bits = self._fetch(step, metrics)["train/bits_per_byte"]  # waits for the step
                seconds = time.monotonic() - self._resumed_at
                self.progress.message(f"compiled in {seconds:.0f} s; step {step}: {bits:.3f} bits per byte")
                self._resumed_at = time.monotonic()
            if unread is not None:
                self._read(*unread)
            unread = (step, metrics)

            is_last = step == last
            stops = self.stop.is_set()  # asked once: a signal from here on must not skip the save
            evaluates = is_last or step % config.eval_every == 0
            saves = is_last or step % config.checkpoint_every == 0 or stops
            if evaluates or saves:
                self._read(*unread)
                unread = None
                self.seconds += time.monotonic() - self._resumed_at
                if evaluates:
                    self._evaluate(step, state)
                if saves:
                    self.checkpoints.save(step, state, self.meta | {"train_seconds": self.seconds})
                self._resumed_at = time.monotonic()
            if stops:
                break
        batches.close()
        return state

    def _read(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Logs the metrics of a step in their turn."""
        values = self._fetch(step, metrics)
        self._interval.append(values)
        if step % self.config.log_every == 0 or step == self.config.num_steps:
            self._log(step, values)

    def _fetch(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """Returns the metrics of a step; raises RunError if they forbid to go on."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        problem = step_problem(self.config, values)
        if problem:
            self.checkpoints.wait()
            good = self.checkpoints.latest_step()
            good = "there is no checkpoint" if good is None else f"the last good checkpoint is {good}"
            raise RunError(f"step {step}: {problem}; {good}")
        return values

    def _log(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        self.seconds += now - self._resumed_at
        seconds, self._resumed_at = now - self._resumed_at, now
        count = len(self._interval)
        num_bytes = sum(each["train/target_bytes"] for each in self._interval)
        self.writer.write(step, values | {"perf/bytes_per_second": num_bytes / seconds})
        # The file has this step's own values, so that a resumed run repeats them; the console has the mean.
        fields = {"bits/byte": sum(each["train/bits_per_byte"] for each in self._interval) / count,
                  "bytes/s": num_bytes / seconds}
        for index in range(len(self.config.model.stages) - 1):
            rate = sum(each[f"stage{index}/boundary_rate"] for each in self._interval) / count
            fields["boundary rate" if index == 0 else f"stage{index} rate"] = rate
        overflow = sum(v for each in self._interval for k, v in each.items() if k.endswith("overflow_boundaries"))
        if overflow:
            fields["overflowed boundaries"] = overflow
        self.progress.update(step, fields)
        self._interval = []

    def _evaluate(self, step: int, state: TrainState) -> None:
        batches = (self.held_out[index] for index in range(len(self.held_out)))
        metrics = self.evaluate(weights(state), batches)
        self.writer.write(step, metrics)
        self.progress.message(
            f"step {step}: {metrics['eval/bits_per_byte']:.3f} bits per byte "
            f"on {self.held_out.num_bytes:,} held-out bytes")


def _describe_run(config: RunConfig, workdir: Path, corpus: Corpus, state: TrainState) -> None:
    """Writes config.json and manifest.json, and says in a few lines what is about to happen."""
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    lines = corpus_reference_lines(corpus)
    write_manifest(
        workdir, step=int(state.step), seed=config.seed, num_params=num_params, corpus=corpus.fingerprint,
        reference_lines=lines)
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(config_to_json(config) + "\n")
        device = jax.devices()[0]
        print(f"{num_params:,} parameters on {jax.device_count()} x {device.device_kind}, run in {workdir}")
        print(f"corpus {config.data.source}: {corpus.fingerprint['files']:,} documents, "
              f"{corpus.fingerprint['bytes']:,} bytes")
        print("to compare, bits per byte on held-out text: "
              + ", ".join(f"{name} {value:.2f}" for name, value in lines.items()), flush=True)


@contextlib.contextmanager
def _sigterm_noted() -> Iterator[threading.Event]:
    """While training, SIGTERM only sets this event; afterwards it ends the process as ever."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    run_command(main)
