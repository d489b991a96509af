"""The contexts of a command, and what came out of each: one JSON file, written when its questions are answered."""
import dataclasses
import itertools
import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config.codec import flat_fields
from experiments.config.files import config_from_saved
from experiments.runs.grid import refuse_another_config
from experiments.tasks.longcontext.examples import Example
from experiments.tasks.longcontext.generators import TASKS, Maker
from experiments.tasks.longcontext.reader import Reader
from hnet import HNetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that the result of a context depends on; results of other settings are not mixed in.

    Attributes:
      method: name of the compression; "none" = the whole state.
      question: see `ModelReader`.
      seed, pairs: see `Choices`.
      room: tokens that contexts leave free.
      source, documents, sha256: of the text.
      tokenizer: its fingerprint.
      step: the checkpoint of the model.
    """

    method: str = "none"
    question: str
    seed: int
    pairs: int
    room: int
    source: str
    documents: int
    sha256: str
    tokenizer: str
    step: int
    model: HNetConfig


@dataclasses.dataclass(frozen=True)
class ContextName:
    """The name of a context among those of a suite."""

    task: str
    length: int
    draw: int
    part: str = ""

    def __str__(self) -> str:
        return f"{self.task} {self.length} draw {self.draw}{self.part and f' {self.part}'}"

    def path(self, outdir: Path) -> Path:
        name = f"{self.task}-{self.length}-draw{self.draw}{self.part and f'-{self.part}'}.json"
        return outdir / "contexts" / name


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question, answered."""

    task: str            # with " without source" for a control
    depth: float | None  # of the passage that holds the answer
    num_units: int       # digits or tokens of the answer
    nats: list[float]    # per token of the answer
    is_right: list[bool]  # whether it was the most probable one in its place


@dataclasses.dataclass(frozen=True)
class Result:
    """One context and its questions, finished."""

    task: str
    length: int          # tokens of context, question and answer together
    draw: int
    part: str
    answers: list[Answer]
    read_seconds: float     # of the context, without compilation
    answer_seconds: float   # mean over the questions
    compile_seconds: float  # of all programs for this length
    state_bytes: int        # of what answers were read from
    peak_bytes: int         # largest resident memory of the process so far; lengths rise
    commit: str             # and what else tells where the numbers come from
    is_dirty: bool
    device: str
    versions: dict[str, str]
    config: dict[str, Any]  # the saved fields of `Settings`

    @property
    def name(self) -> ContextName:
        return ContextName(self.task, self.length, self.draw, self.part)

    @property
    def summary(self) -> str:
        """Says how many answers were right, and their nats per unit."""
        num_right = sum(all(answer.is_right) for answer in self.answers)
        nats = np.mean([sum(answer.nats) / answer.num_units for answer in self.answers])
        return f"{num_right}/{len(self.answers)} exact, {nats:.3f} nats"


Plan = dict[ContextName, list[Example]]


def plan(make: Maker, tasks: Sequence[str], draws: Mapping[int, int]) -> Plan:
    """Makes all examples of a suite, by context, by rising length.

    Args:
      draws: how many, by length.
    Raises:
      UsageError: a length leaves a test no room, or the text is too short.
    """
    return {
        ContextName(task, length, draw, part): examples
        for length in sorted(draws) for draw in range(draws[length]) for task in tasks
        for part, examples in TASKS[task](make, length, draw)}


def shared_contexts(wanted: Plan) -> Iterator[list[tuple[ContextName, list[Example]]]]:
    """Groups the contexts of one length and draw that are equal: they are read once."""
    for _, each in itertools.groupby(wanted.items(), key=lambda item: (item[0].length, item[0].draw)):
        groups: dict[bytes, list[tuple[ContextName, list[Example]]]] = {}
        for name, examples in each:
            groups.setdefault(examples[0].context.tobytes(), []).append((name, examples))
        yield from groups.values()


def ask(reader: Reader, examples: Sequence[Example], state: Any) -> list[Answer]:
    """Asks all questions of a context whose state is `state`."""
    answers = []
    for example in examples:
        answered = reader.answer(state, example.question, example.answer)
        answers.append(Answer(
            example.task, example.depth, example.num_units, [float(nats) for nats in answered.nats],
            [bool(right) for right in answered.best == example.answer]))
    return answers


def evaluate(
    reader: Reader, group: Sequence[tuple[ContextName, list[Example]]], origin: Mapping[str, Any]
) -> list[Result]:
    """Reads one context, and asks the questions of all tests that share it.

    Args:
      origin: the last fields of `Result`.
    """
    before = time.perf_counter()
    state = reader.read(group[0][1][0].context)
    read_seconds, results = time.perf_counter() - before, []
    for name, examples in group:
        before = time.perf_counter()
        answers = ask(reader, examples, state)
        results.append(Result(
            **dataclasses.asdict(name), answers=answers, read_seconds=read_seconds,
            answer_seconds=(time.perf_counter() - before) / len(examples), compile_seconds=reader.compile_seconds,
            state_bytes=reader.state_bytes(state), peak_bytes=peak_bytes(), **origin))
    return results


def peak_bytes() -> int:
    """Returns the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def load(name: ContextName, outdir: Path, settings: Settings) -> Result | None:
    """Returns the result of a context, or None where it is not finished.

    Raises:
      UsageError: it was made with other settings, or of another run.
    """
    path = name.path(outdir)
    if not path.is_file():
        return None
    fields = json.loads(path.read_text(encoding="utf-8"))
    # Through Settings, which fills in fields that were added since.
    before = config_from_saved(fields["config"], Settings)
    refuse_another_config(path, flat_fields(before), flat_fields(settings))
    return Result(**fields | {"answers": [Answer(**each) for each in fields["answers"]]})
