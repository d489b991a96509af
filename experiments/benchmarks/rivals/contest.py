"""Two sides compute the same and take turns, so that a machine that slows down slows both."""
import dataclasses
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.errors import RunError


class Turn(NamedTuple):
    """One turn of a side: the seconds that it took by its own clock, and its result."""

    seconds: float
    result: np.ndarray


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one side over the rounds."""

    seconds: tuple[float, ...]

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
        """Median of ours over the rival's, round by round; below 1 we are faster."""
        return statistics.median(
            ours / rival for ours, rival in zip(self.ours.seconds, self.rival.seconds, strict=True))


def contest(
    case: str, ours: Callable[[], Turn], rival: Callable[[], Turn], *, rounds: int, tolerance: float
) -> Contest:
    """Runs both sides in turns, after one turn of each that is checked and not timed; who begins alternates.

    Args:
      case: names it in messages.
      tolerance: largest difference of two elements of the results, in every round.
    Raises:
      RunError: results differ; no time is then known.
    """
    check_equal(case, ours().result, rival().result, tolerance)
    seconds: dict[str, list[float]] = {"ours": [], "rival": []}
    for index in range(rounds):
        turns = {}
        for name in ("ours", "rival") if index % 2 == 0 else ("rival", "ours"):
            turns[name] = (ours if name == "ours" else rival)()
            seconds[name].append(turns[name].seconds)
        check_equal(case, turns["ours"].result, turns["rival"].result, tolerance)
    return Contest(Times(tuple(seconds["ours"])), Times(tuple(seconds["rival"])))


def check_equal(case: str, ours: np.ndarray, rival: np.ndarray, tolerance: float) -> None:
    """Raises RunError where two results differ in shape, by more than `tolerance`, or hold what is no number."""
    ours, rival = np.asarray(ours, np.float64), np.asarray(rival, np.float64)
    if ours.shape != rival.shape:
        raise RunError(f"{case}: our result has shape {ours.shape}, the rival's {rival.shape}; nothing was timed")
    error = float(np.max(np.abs(ours - rival), initial=0.0))
    if not error <= tolerance:  # so that NaN is refused too
        raise RunError(f"{case}: our result and the rival's differ by {error:.2g}, and {tolerance:g} would be "
                       "rounding; nothing was timed")
