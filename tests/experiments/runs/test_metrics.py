import json
import math
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from experiments.errors import UsageError
from experiments.runs.metrics import MetricsWriter, read_metrics


def write_steps(workdir, steps, **kwargs):
    with MetricsWriter(workdir, tensorboard=False) as writer:
        for step in steps:
            writer.write(step, {"train/loss": step / 10, **kwargs})


def steps_in(workdir):
    return [record["step"] for record in read_metrics(workdir / "metrics.jsonl")]


def test_every_record_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in (1, 2):
        writer.write(step, {"train/loss": 0.1 + 0.2})
        assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": step, "train/loss": 0.1 + 0.2}
    writer.close()


def test_numbers_that_are_not_finite_leave_the_file_valid_json(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf}
    write_steps(tmp_path, [1], **values)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    json.loads(line, parse_constant=refuse)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


def test_truncating_drops_exactly_the_records_past_the_restored_step(tmp_path):
    write_steps(tmp_path, [10, 20, 20, 30, 40])
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.truncate_after(20)
        writer.write(30, {"train/loss": 7.0})
    assert steps_in(tmp_path) == [10, 20, 20, 30]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["train/loss"] == 7.0


def test_truncating_a_run_without_metrics_is_fine(tmp_path):
    MetricsWriter(tmp_path).truncate_after(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", ['{"step": 3, "tra', '{"step": 3}'])
def test_a_torn_last_line_is_left_out_and_never_glued_to_the_next(tmp_path, torn):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert steps_in(tmp_path) == [1, 2]
    write_steps(tmp_path, [3])
    assert steps_in(tmp_path) == [1, 2, 3]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    MetricsWriter(tmp_path).truncate_after(2)
    assert steps_in(tmp_path) == [1, 2]


def test_damage_before_the_last_line_is_refused_by_line(tmp_path):
    write_steps(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("{torn\n")
    write_steps(tmp_path, [2])
    with pytest.raises(UsageError, match="line 2 is not a metrics record"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(UsageError, match="no metrics at"):
        read_metrics(tmp_path / "elsewhere.jsonl")


def test_tensorboard_gets_every_scalar_and_on_resume_the_step_to_purge_from(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(10, {"train/loss": 2.5, "eval/loss": 3.5})
    scalars = {
        (event.step, value.tag): value.simple_value
        for event in _events(tmp_path / "tb")
        for value in event.summary.value
    }
    assert scalars == {(10, "train/loss"): 2.5, (10, "eval/loss"): 3.5}

    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(4)
        writer.write(5, {"train/loss": 2.0})
    starts = [e.step for e in _events(tmp_path / "tb") if e.session_log.status == SessionLog.START]
    assert starts == [5]


def _events(directory):
    """Reads TensorBoard files: records of a length, its checksum, an Event, its checksum."""
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
