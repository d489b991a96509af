"""Metrics are read one step late, and only time spent on steps counts."""
import math

import pytest

from experiments.errors import RunError
from experiments.runs import step_log
from experiments.runs.step_log import StepLog
from tests.support.runs import config_of


class Recorder:
    """In place of the writer, the progress and the checkpoints of a run: notes what they are told."""

    def __init__(self):
        self.records, self.lines, self.messages, self.was_awaited = {}, {}, [], False

    def write(self, step, metrics):
        self.records[step] = metrics

    def update(self, step, fields):
        self.lines[step] = fields

    def message(self, text):
        self.messages.append(text)

    def wait(self):
        self.was_awaited = True

    def latest_step(self):
        return 1 if self.was_awaited else None


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the log sees, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(step_log.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def run(tiny, clock):
    recorder, config = Recorder(), config_of(tiny, "log_every=2", "num_steps=5")
    return StepLog(config, recorder, recorder, recorder, seconds=50.0), recorder


def _metrics(step: int, **changes) -> dict[str, float]:
    return {"train/bits_per_byte": float(step), "train/loss_nats": 1.0, "train/grad_norm": 1.0,
            "train/param_norm": 1.0,
            "train/target_bytes": 1000.0, "stage0/boundary_rate": 0.25, "stage0/overflow_boundaries": 0.0,
            "stage0/boundaries": 10.0} | changes


def test_a_step_is_logged_when_the_next_one_is_under_way_and_the_last_by_catching_up(run, clock):
    log, recorder = run
    logged = []
    for step in range(1, 6):
        clock[0] += 2
        log.add(step, _metrics(step))
        logged.append(sorted(recorder.records))
    assert logged == [[], [], [2], [2], [2, 4]]
    clock[0] += 1
    log.catch_up()
    assert sorted(recorder.records) == [2, 4, 5]  # the last step of a run is logged, whatever log_every
    assert recorder.records[4]["train/bits_per_byte"] == 4 and recorder.lines[4]["bits/byte"] == 3.5
    log.catch_up()
    assert sorted(recorder.lines) == [2, 4, 5]


def test_only_time_spent_on_steps_counts(run, clock):
    log, recorder = run
    clock[0] += 30  # compilation
    log.add(1, _metrics(1))
    assert recorder.messages == ["compiled in 30 s; step 1: 1.000 bits per byte"] and log.seconds == 50
    clock[0] += 4
    log.add(2, _metrics(2))
    with log.paused():
        clock[0] += 1000
        assert log.seconds == 54
    clock[0] += 6
    log.add(3, _metrics(3))
    assert log.seconds == 60
    assert recorder.records[2]["perf/bytes_per_second"] == 2000 / 10
    clock[0] += 5
    log.add(4, _metrics(4))
    log.catch_up()
    assert recorder.records[4]["perf/bytes_per_second"] == 2000 / 5


@pytest.mark.parametrize("name", ["train/loss_nats", "train/grad_norm", "train/param_norm"])
def test_a_number_that_is_not_finite_names_its_step_and_the_last_good_checkpoint(run, clock, name):
    log, recorder = run
    log.add(1, _metrics(1))
    clock[0] += 1
    log.add(2, _metrics(2, **{name: math.nan}))
    with pytest.raises(RunError, match=f"^step 2: {name} is nan; .*; the last good checkpoint is 1$"):
        log.add(3, _metrics(3))
    assert recorder.was_awaited, "a checkpoint that is being written may be the last good one"


def test_the_console_sums_overflow_and_the_file_has_each_steps_own(run, clock):
    log, recorder = run
    for step in (1, 2):
        clock[0] += 1
        log.add(step, _metrics(step, **{"stage0/overflow_boundaries": step}))
    log.catch_up()
    assert recorder.lines[2]["overflowed boundaries"] == 3
    assert recorder.records[2]["stage0/overflow_boundaries"] == 2
