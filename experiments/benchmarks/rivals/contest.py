"""Two sides compute the same and take turns, so that a machine that slows down slows both."""
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.errors import RunError


class Turn(NamedTuple):
    """One turn of a side: the seconds that it took by its own clock and on its processors, and its result."""

    seconds: float
    cpu_seconds: float
    result: np.ndarray


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one side over the rounds."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    @classmethod
    def of(cls, turns: Sequence[Turn]) -> "Times":
        return cls(tuple(turn.seconds for turn in turns), tuple(turn.cpu_seconds for turn in turns))

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest round."""
        return min(self.seconds), max(self.seconds)


class Contest(NamedTuple):
    """The times of both sides over the same rounds."""

    ours: Times
    rival: Times

    @property
    def ratio(self) -> float:
        """Our time over the rival's, the median over the rounds; below 1 we are faster."""
        return _median_ratio(self.ours.seconds, self.rival.seconds)

    @property
    def cpu_ratio(self) -> float:
        """The same of the time on processors, which other work on the machine changes less."""
        return _median_ratio(self.ours.cpu_seconds, self.rival.cpu_seconds)


def _median_ratio(ours: Sequence[float], rival: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, rival, strict=True))


def contest(
    case: str, ours: Callable[[], Turn], rival: Callable[[], Turn], *, rounds: int, tolerance: float
) -> Contest:
    """Runs both sides in turns, after one turn of each that is checked and not timed; who begins alternates.

    Args:
      case: names it in messages.
      tolerance: of `check_equal`, which looks at the results of every round.
    Raises:
      RunError: results differ; no time is then known.
    """
    check_equal(case, ours().result, rival().result, tolerance)
    all_turns: dict[str, list[Turn]] = {"ours": [], "rival": []}
    for index in range(rounds):
        turns = {}
        for name in ("ours", "rival") if index % 2 == 0 else ("rival", "ours"):
            turns[name] = (ours if name == "ours" else rival)()
            all_turns[name].append(turns[name])
        check_equal(case, turns["ours"].result, turns["rival"].result, tolerance)
    return Contest(Times.of(all_turns["ours"]), Times.of(all_turns["rival"]))


def check_equal(case: str, ours: np.ndarray, rival: np.ndarray, tolerance: float) -> None:
    """Checks two results row by row: RMS of the difference over RMS of the rival's.

    Raises:
      RunError: the shapes differ, a row differs by more than `tolerance`, or holds what is no number.
    """
    ours, rival = np.asarray(ours, np.float64), np.asarray(rival, np.float64)
    if ours.shape != rival.shape:
        raise RunError(f"{case}: our result has shape {ours.shape}, the rival's {rival.shape}; nothing was timed")
    def rms(x: np.ndarray) -> np.ndarray:
        return np.sqrt(np.mean(x**2, axis=-1))

    error = float(np.max(rms(ours - rival) / np.maximum(rms(rival), np.finfo(np.float64).tiny)))
    if not error <= tolerance:  # so that NaN is refused too
        raise RunError(f"{case}: our result and the rival's differ by {error:.2g} of its size, and "
                       f"{tolerance:g} would be rounding; nothing was timed")
