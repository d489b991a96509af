"""One test of the suite, as token ids."""
import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.data.tokenizer import Tokenizer

ROOM = 96  # tokens that a context leaves free: the longest question with its answer


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A context, a question about it, and the answer. Examples with equal contexts can share its state.

    Attributes:
      task: the name of the test, with " without source" for a control.
      context: int32 [length - ROOM], the part that may be compressed.
      question: int32 [at least 1], read after the context.
      answer: int32 [at least 1], which a model that has understood predicts.
      num_units: digits or tokens of the answer, for nats per unit.
      origin: [start, stop) of the passage of the context that the answer is taken from; None = nothing is.
      depth: of that passage, 0 = the beginning of the context, 1 = its end; None = no passage.
    """

    task: str
    context: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    num_units: int
    depth: float | None = None
    origin: tuple[int, int] | None = None

    def __post_init__(self):
        if not len(self.question) or not len(self.answer):
            raise ValueError(f"{self.task}: a question and an answer need at least one token each, not "
                             f"{len(self.question)} and {len(self.answer)}")
        if len(self.question) + len(self.answer) > ROOM:
            raise ValueError(f"{self.task}: a question of {len(self.question)} tokens with an answer of "
                             f"{len(self.answer)} is longer than the {ROOM} that a context leaves free")


def split_answer(tokenizer: Tokenizer, question: bytes, answer: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a question with its answer, and cuts them apart.

    A token with bytes of both belongs to the answer: text reads the same ids in a context.
    """
    ids = tokenizer.encode(question + answer)
    first = int(np.searchsorted(np.cumsum(tokenizer.num_bytes[ids]), len(question), side="right"))
    return ids[:first].astype(np.int32), ids[first:].astype(np.int32)


def insert(prose: np.ndarray, pieces: Sequence[np.ndarray], depths: Sequence[float]) -> tuple[np.ndarray, list]:
    """Puts each piece into the prose at its depth: 0 = before it, 1 = after it.

    Returns the ids, and [start, stop) of every piece among them.
    """
    places = [round(depth * len(prose)) for depth in depths]
    parts, spans, done, total = [], [], 0, 0
    for place, piece in sorted(zip(places, pieces, strict=True), key=lambda pair: pair[0]):
        parts += [prose[done:place], piece]
        total += place - done
        spans.append((total, total + len(piece)))
        total, done = total + len(piece), place
    return np.concatenate([*parts, prose[done:]]).astype(np.int32), spans
