import io
import os
import re

import jax
import pytest

from experiments.runs.progress import Progress, format_field


def run(file, fields):
    clock = iter([100.0, 110.0, 115.0]).__next__
    with Progress(total_steps=400, start_step=100, file=file, clock=clock) as progress:
        progress.message("compiling [x] ...")
        progress.update(110, fields)
        progress.update(210, fields)
        progress.message("eval done")
        progress.update(310, fields)


FIELDS = {"bits/byte": 2.34567, "bytes/s": 16543.21, "boundary rate": 0.25, "note": "ok"}


def test_without_a_terminal_each_update_is_one_plain_line():
    file = io.StringIO()
    run(file, FIELDS)
    rest = "bits/byte 2.346  bytes/s 16,543  boundary rate 0.250  note ok"
    assert file.getvalue().split("\n") == [
        "compiling [x] ...",
        f"step 110/400  {rest}  eta ?",
        f"step 210/400  {rest}  eta 0:00:19",  # 10 s for 100 steps, 190 to go
        "eval done",
        f"step 310/400  {rest}  eta 0:00:07",  # 15 s for 200 steps, 90 to go
        "",
    ]


def test_plain_lines_are_flushed_one_by_one():
    class Unflushed(io.StringIO):
        flushed = ""

        def flush(self):
            self.flushed = self.getvalue()

    file = Unflushed()
    progress = Progress(total_steps=10, file=file)
    progress.update(1, {"bits/byte": 8.0})
    assert file.flushed.startswith("step  1/10  bits/byte 8.000")


@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_terminal_messages_stay_above_a_live_line_that_shows_every_field(monkeypatch, columns):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "24")
    reader, writer = os.openpty()
    with open(writer, "w") as terminal:
        run(terminal, FIELDS)
        print("<end>", file=terminal, flush=True)
        output = b""
        while b"<end>" not in output:
            output += os.read(reader, 4096)
    os.close(reader)
    output = output.decode()
    assert "\x1b[?25l" in output and output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # cursor is back
    screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert screen.count("compiling [x] ...") == 1 and screen.count("eval done") == 1
    last_frame = screen[screen.rindex("step 310/400") :]
    for word in ("bits/byte", "2.346", "16,543", "0.250", "ok", "0:00:07"):
        assert word in last_frame


def test_other_processes_print_nothing(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    file = io.StringIO()
    run(file, FIELDS)
    assert file.getvalue() == ""


def test_a_field_without_a_format_gets_four_digits():
    assert format_field("grad norm", 0.123456) == "grad norm 0.1235"
    assert format_field("grad norm", "n/a") == "grad norm n/a"


def test_short_work_prints_nothing_and_long_work_a_line_now_and_then():
    file, seconds = io.StringIO(), iter([0.0, 4.0, 7.0, 7.0, 8.0, 100.0])
    progress = Progress(0, unit="batch", file=file, clock=seconds.__next__)
    for step in range(1, 6):
        progress.seldom(step, 5)
    assert file.getvalue() == "batch 3/5  eta 0:00:07\n"  # 7 s for two batches after the first, two to go


def test_on_a_terminal_short_work_leaves_no_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = os.openpty()
    with open(writer, "w") as terminal:
        with Progress(0, file=terminal) as progress:
            progress.seldom(1, 1)
        print("<end>", file=terminal, flush=True)
        output = b""
        while b"<end>" not in output:
            output += os.read(reader, 4096)
    os.close(reader)
    assert output.strip() == b"<end>"
