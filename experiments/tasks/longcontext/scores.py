"""Scores of a suite: exact answers and nats, each with its chance level and a 95 % interval.

An answer is exact if every token of it was the most probable one given those before it, which is what greedy
decoding would have written. Shares have Wilson's score interval; means of nats a percentile bootstrap over answers
(2000 resamples, seeded). Both count answers as independent, though some share a context.
"""
import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.config.files import saved_fields
from experiments.tasks.longcontext.generators import CODE_DIGITS, TASKS
from experiments.tasks.longcontext.suite import Answer, Result, Settings

Z = 1.959964  # of the normal distribution: 95 % lie within
RESAMPLES = 2000
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Score:
    """All answers of a test at one length, or at one length and depth.

    Attributes:
      task: with " without source" for a control.
      depth: None = all depths together.
      exact, nats: share of exact answers, and mean nats per digit or token of the answer.
      right: share of the tokens of answers that were the most probable ones.
      exact_interval, nats_interval: of 95 %; nats of a single answer have none.
      exact_chance, nats_chance: of guesses that know the form of the answer: digits, a listed value, or any token.
    """

    task: str
    length: int
    depth: float | None
    num_answers: int
    exact: float
    exact_interval: Interval
    exact_chance: float
    right: float
    nats: float
    nats_interval: Interval | None
    nats_chance: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Time and memory of a length: medians over contexts, and the largest memory."""

    length: int
    num_contexts: int
    compile_seconds: float
    read_seconds: float
    answer_seconds: float
    state_bytes: int
    peak_bytes: int


def score_all(results: Iterable[Result], *, vocab_size: int, num_pairs: int) -> list[Score]:
    """Scores every test at every length, and the tests with depths at each of these too."""
    groups: dict[tuple[str, int, float | None], list[Answer]] = {}
    for result in results:
        for answer in result.answers:
            groups.setdefault((answer.task, result.length, None), []).append(answer)
            if answer.depth is not None:
                groups.setdefault((answer.task, result.length, answer.depth), []).append(answer)
    order = {task: index for index, task in enumerate(TASKS)}
    keys = sorted(groups, key=lambda key: (order[base_task(key[0])], *key[:2], -1 if key[2] is None else key[2]))
    return [_score(*key, groups[key], chances(key[0], vocab_size=vocab_size, num_pairs=num_pairs)) for key in keys]


def chances(task: str, *, vocab_size: int, num_pairs: int) -> tuple[float, float]:
    """Returns the share of exact answers, and the nats, of guesses that know the form of the answer alone."""
    if base_task(task) in ("needle", "multi_needle"):
        return 10.0**-CODE_DIGITS, math.log(10)
    if task == "key_value":
        return 1 / num_pairs, math.log(10)  # exact: one of the listed values; nats: any digit
    return 0.0, math.log(vocab_size)        # 64 tokens in a row


def base_task(task: str) -> str:
    """Returns the test that a control belongs to."""
    return task.removesuffix(" without source")


def costs(results: Iterable[Result]) -> list[Cost]:
    """Returns one entry per length, by rising length."""
    by_length: dict[int, list[Result]] = {}
    for result in results:
        by_length.setdefault(result.length, []).append(result)
    return [Cost(
        length, len(each), max(result.compile_seconds for result in each),
        statistics.median(result.read_seconds for result in each),
        statistics.median(result.answer_seconds for result in each),
        max(result.state_bytes for result in each), max(result.peak_bytes for result in each))
        for length, each in sorted(by_length.items())]


def wilson(successes: int, total: int) -> Interval:
    """Returns the 95 % score interval of a share (Wilson, 1927)."""
    share = successes / total
    middle = (share + Z**2 / (2 * total)) / (1 + Z**2 / total)
    half = Z / (1 + Z**2 / total) * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(values: Sequence[float]) -> Interval | None:
    """Returns the 95 % percentile interval of the mean of resamples; None for fewer than two values."""
    if len(values) < 2:
        return None
    values = np.asarray(values, np.float64)
    drawn = np.random.RandomState(0).randint(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def summary(results: Sequence[Result], settings: Settings, scores: list[Score]) -> dict[str, Any]:
    """Returns the JSON of a suite: settings, origin, scores and costs."""
    origins = [{"commit": each.commit, "is_dirty": each.is_dirty, "device": each.device, "versions": each.versions}
               for each in results]
    return {
        "settings": saved_fields(settings),
        "origins": [origin for index, origin in enumerate(origins) if origin not in origins[:index]],
        "scores": [dataclasses.asdict(score) for score in scores],
        "costs": [dataclasses.asdict(cost) for cost in costs(results)],
    }


def _score(
    task: str, length: int, depth: float | None, answers: list[Answer], chance: tuple[float, float]
) -> Score:
    num_exact = sum(all(answer.is_right) for answer in answers)
    nats = [sum(answer.nats) / answer.num_units for answer in answers]
    right = [is_right for answer in answers for is_right in answer.is_right]
    return Score(
        task, length, depth, len(answers), num_exact / len(answers), wilson(num_exact, len(answers)), chance[0],
        statistics.fmean(right), statistics.fmean(nats), bootstrap(nats), chance[1])
