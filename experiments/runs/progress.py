"""Progress of a run on the console: a live line on a terminal, otherwise a plain line per update."""
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

import jax
import rich.progress
from rich.console import Console
from rich.table import Column

# How each number is written; a name that is not listed gets four significant digits.
FIELD_FORMATS = {"bits/byte": ".3f", "bytes/s": ",.0f", "boundary rate": ".3f", "overflowed boundaries": ",.0f"}
SELDOM_SECONDS = 5.0  # between lines on work that is short most of the time


class Progress:
    """The progress of a run, shown by the first process alone.

      with Progress(total_steps=1000) as progress:
          progress.message("compiling ...")
          progress.update(10, {"bits/byte": 5.3, "bytes/s": 16_500.0, "boundary rate": 0.27})
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        unit: str = "step",
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prints to `file`, stdout if None; `clock` returns seconds, and `unit` is a step's name.

        With `total_steps` 0, nothing shows before the first update, which work of unknown size may never have.
        """
        self._unit = unit
        self._file = file or sys.stdout
        self._total_steps = total_steps
        self._clock = clock
        self._is_active = jax.process_index() == 0
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._shown_at: float | None = None           # by `seldom`
        self._live: rich.progress.Progress | None = None
        console = Console(file=self._file)
        if self._is_active and self._file.isatty() and not console.is_dumb_terminal:
            wrapped = Column(no_wrap=False)  # on a narrow terminal two lines, rather than one without its end
            text = rich.progress.TextColumn("{task.description}", markup=False, table_column=wrapped)
            bar = rich.progress.BarColumn(bar_width=20)
            self._live = rich.progress.Progress(bar, text, console=console)
            self._task = self._live.add_task("", total=total_steps, completed=start_step)

    def __enter__(self) -> Self:
        if self._live and self._total_steps:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, step: int, fields: dict[str, str | float]) -> None:
        """Shows that `step` steps are done, with these fields and the time that is left."""
        now = self._clock()
        self._first = self._first or (step, now)
        parts = [f"{self._unit} {step:>{len(str(self._total_steps))}}/{self._total_steps}"]
        parts += [format_field(name, value) for name, value in fields.items()]
        parts.append(f"eta {self._time_left(step, now)}")
        line = "  ".join(parts)
        if self._live:
            self._live.start()  # does nothing where it has started
            self._live.update(self._task, completed=step, total=self._total_steps, description=line)
        else:
            self.message(line)

    def seldom(self, step: int, total_steps: int) -> None:
        """Shows that `step` of so many are done: in plain lines, some seconds apart and neither first nor last."""
        self._total_steps, now = total_steps, self._clock()
        if self._shown_at is None:  # with the first call the model compiled
            self._shown_at, self._first = now, (step, now)
        is_due = step < total_steps and now - self._shown_at >= SELDOM_SECONDS
        if is_due or (self._live and total_steps > 1):
            self._shown_at = now
            self.update(step, {})

    def message(self, text: str) -> None:
        """Prints a line that stays, above the live line if there is one."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._is_active:
            print(text, file=self._file, flush=True)

    def _time_left(self, step: int, now: float) -> str:
        first_step, first_time = self._first
        if step == first_step:  # counting from the first update leaves compilation out of the speed
            return "?"
        seconds = round((now - first_time) / (step - first_step) * (self._total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def format_field(name: str, value: str | float) -> str:
    """Writes one field: "bits/byte 2.312"."""
    return f"{name} {value if isinstance(value, str) else format(value, FIELD_FORMATS.get(name, '.4g'))}"
