"""Metrics of training steps: read one step late, checked, and logged with the throughput of an interval."""
import contextlib
import time
from collections.abc import Iterator

import jax

from experiments.config import RunConfig
from experiments.errors import RunError
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.metrics import MetricsWriter
from experiments.runs.progress import Progress
from experiments.training.step_problems import step_problem


class Stopwatch:
    """Seconds, added up while it runs."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._stopped_at, self._since = seconds, None

    @property
    def seconds(self) -> float:
        return self._stopped_at + (0.0 if self._since is None else time.monotonic() - self._since)

    def start(self) -> None:
        self._since = time.monotonic()

    def stop(self) -> None:
        self._stopped_at, self._since = self.seconds, None


class StepLog:
    """The metrics of a run's steps, each read when the next step is under way, so that the device never waits."""

    def __init__(
        self, config: RunConfig, writer: MetricsWriter, progress: Progress, checkpoints: Checkpoints,
        seconds: float,
    ) -> None:
        """Begins with the `seconds` that earlier steps took, those of a run that is resumed."""
        self._config, self._writer, self._progress, self._checkpoints = config, writer, progress, checkpoints
        self._began, self._compiled = time.monotonic(), False
        self._clock, self._logged_at = Stopwatch(seconds), seconds
        self._unread: tuple[int, dict[str, jax.Array]] | None = None
        self._interval: list[dict[str, float]] = []  # metrics of the steps since the last record

    @property
    def seconds(self) -> float:
        """Time spent on steps since step 0, without compilation and what was done in `paused`."""
        return self._clock.seconds

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step and logs those of the step before; waits only for the first step.

        Raises:
          RunError: the metrics that were read must stop the run.
        """
        if not self._compiled:
            bits = self._fetch(step, metrics)["train/bits_per_byte"]  # waits for the step
            self._compiled, seconds = True, time.monotonic() - self._began
            self._progress.message(f"compiled in {seconds:.0f} s; step {step}: {bits:.3f} bits per byte")
            self._clock.start()
        self.catch_up()
        self._unread = step, metrics

    def catch_up(self) -> None:
        """Logs the metrics of the latest step, too; raises as `add` does."""
        if self._unread is not None:
            (step, metrics), self._unread = self._unread, None
            self._interval.append(self._fetch(step, metrics))
            if step % self._config.log_every == 0 or step == self._config.num_steps:
                self._log(step)

    def add_evaluation(self, step: int, metrics: dict[str, float], num_bytes: int) -> None:
        """Logs what a model of this step makes of `num_bytes` held-out bytes."""
        self._writer.write(step, metrics)
        self._progress.message(f"step {step}: {metrics['eval/bits_per_byte']:.3f} bits per byte "
                               f"on {num_bytes:,} held-out bytes")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of `seconds`."""
        self._clock.stop()
        yield
        self._clock.start()

    def _fetch(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        problem = step_problem(self._config, values)
        if problem:
            self._checkpoints.wait()
            good = self._checkpoints.latest_step()
            good = "there is no checkpoint" if good is None else f"the last good checkpoint is {good}"
            raise RunError(f"step {step}: {problem}; {good}")
        return values

    def _log(self, step: int) -> None:
        def mean(name: str) -> float:
            return sum(each[name] for each in self._interval) / len(self._interval)

        now = self._clock.seconds
        speed = sum(each["train/target_bytes"] for each in self._interval) / (now - self._logged_at)
        # The file has this step's own values, so that a resumed run repeats them; the console has the mean.
        self._writer.write(step, self._interval[-1] | {"perf/bytes_per_second": speed})
        fields = {"bits/byte": mean("train/bits_per_byte"), "bytes/s": speed}
        for index in range(len(self._config.model.stages) - 1):
            fields["boundary rate" if index == 0 else f"stage{index} rate"] = mean(f"stage{index}/boundary_rate")
        overflow = sum(v for each in self._interval for k, v in each.items() if k.endswith("overflow_boundaries"))
        if overflow:
            fields["overflowed boundaries"] = overflow
        self._progress.update(step, fields)
        self._interval, self._logged_at = [], now
