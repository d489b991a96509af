"""The numbers of a run on disk: metrics.jsonl, one JSON object a line, and TensorBoard event files.

A record is {"step": 120, "train/bits_per_byte": 2.31, ...}. JSON has no words for numbers that are not
finite, so they are written as the strings "nan", "inf" and "-inf"; `read_metrics` gives floats back. Each
line is flushed as it is written, so a killed run loses at most a part of its last line.
"""
import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import jax

from experiments.errors import UsageError
from experiments.files import write_whole


class MetricsWriter:
    """Appends records to workdir/metrics.jsonl and, unless told not to, to workdir/tb.

    Only the first process writes; in the others every method does nothing.
    """

    def __init__(self, workdir: Path, tensorboard: bool = True) -> None:
        self._path = Path(workdir) / "metrics.jsonl"
        self._tensorboard_directory = Path(workdir) / "tb" if tensorboard else None
        self._is_active = jax.process_index() == 0
        self._lines: TextIO | None = None  # opened by the first record, after any truncate_after
        self._events: Any = None  # a tensorboardX.SummaryWriter
        self._purge_step: int | None = None

    def truncate_after(self, step: int) -> None:
        """Forgets every record past `step`, which a run resumed there is about to write again.

        TensorBoard files only grow: they get a mark from which on TensorBoard hides what came before.
        """
        assert self._lines is None, "truncate_after comes before the first record"
        self._purge_step = step + 1
        if not (self._is_active and self._path.exists()):
            return
        kept = [record for record in read_metrics(self._path) if record["step"] <= step]
        write_whole(self._path, "".join(map(_to_line, kept)))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one record; the values may also be scalar arrays."""
        if not self._is_active:
            return
        if self._lines is None:
            self._open()
        record = {"step": int(step)} | {name: float(value) for name, value in metrics.items()}
        self._lines.write(_to_line(record))
        self._lines.flush()
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, float(value), step)

    def close(self) -> None:
        for file in (self._lines, self._events):
            if file is not None:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        _cut_torn_line(self._path)
        self._lines = self._path.open("a")
        if self._tensorboard_directory is not None:
            from tensorboardX import SummaryWriter  # half a second to import

            directory = str(self._tensorboard_directory)
            self._events = SummaryWriter(directory, purge_step=self._purge_step, flush_secs=10)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl; a last line without its line end, cut off by a kill, is left out.

    Raises:
      UsageError: the file does not exist, or a whole line is not a record.
    """
    if not Path(path).is_file():
        raise UsageError(f"no metrics at {path}; --workdir must name a run that has written some")
    records = []
    *lines, _ = Path(path).read_text().split("\n")  # what follows the last line end is "" or torn
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({name: float(v) if isinstance(v, str) else v for name, v in record.items()})
        except (ValueError, AttributeError) as error:
            raise UsageError(f"{path} line {number} is not a metrics record: {line[:80]!r}") from error
    return records


def _to_line(record: dict[str, Any]) -> str:
    finite = {name: value if math.isfinite(value) else str(value) for name, value in record.items()}
    return json.dumps(finite) + "\n"


def _cut_torn_line(path: Path) -> None:
    """Cuts what follows the last line end, or the next record would be glued to it."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
