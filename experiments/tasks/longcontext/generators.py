"""The tests of the suite: examples of an exact length, each a pure function of the text, the seed and the draw.

  needle        one fact, "The secret passcode of the red vault is 48213.", in ordinary text, at several depths
  multi_needle  four such facts about different vaults in one text; all are asked
  key_value     lines "river: 417" in the middle of the text; four of the keys are asked
  copy          a passage of the text comes again, after a blank line and the tokens before it. Its control is the
                same question in a text without that passage
  position      the text goes on: its last tokens, which are the same for all lengths

Long-context tests of this kind are those of RULER (arXiv 2404.06654); facts and wording are ours.
"""
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.data.tokenizer import Tokenizer
from experiments.errors import UsageError
from experiments.tasks.longcontext.examples import ROOM, Example, insert, split_answer
from experiments.tasks.longcontext.prose import Prose

VAULTS = ("red", "blue", "green", "white", "black", "yellow", "silver", "golden")
KEYS = ("river", "table", "window", "garden", "stone", "letter", "bridge", "engine", "forest", "market", "island",
        "mirror", "needle", "orange", "pencil", "rabbit", "saddle", "ticket", "valley", "wagon", "anchor",
        "basket", "candle", "dragon", "feather", "hammer", "jacket", "kettle", "ladder", "magnet", "oven",
        "pillow")
CODE_DIGITS, VALUE_DIGITS = 5, 3
NUM_NEEDLES, NUM_ASKED, MOST_COPIES = 4, 4, 4  # per context
CUE, COPIED, CONTINUED = 16, 64, 64            # tokens


class Choices(NamedTuple):
    """Settings of the tests."""

    seed: int = 0
    depths: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)
    num_pairs: int = 16


class Maker(NamedTuple):
    """The material that examples are made of."""

    prose: Prose
    tokenizer: Tokenizer
    choices: Choices

    def context(self, draw: int, length: int, *, less: int = 0) -> np.ndarray:
        """Returns the ordinary text of a draw, without the CONTINUED + 1 tokens that follow it.

        Args:
          less: tokens to leave out at its beginning, to make room for others.
        """
        size = length - ROOM - less - len(self.start)
        if size < 0:
            raise UsageError(f"--lengths: {length} tokens have no room for {less} of a test besides the {ROOM} of "
                             "question and answer; give longer ones, or fewer --pairs")
        return self.prose.last(draw, size + CONTINUED + 1)[:size]

    @property
    def start(self) -> np.ndarray:
        """The token ahead of every context, if the tokenizer has one."""
        bos = self.tokenizer.bos
        return np.array([] if bos is None else [bos], np.int32)

    def random(self, task: str, length: int, *numbers: int) -> np.random.RandomState:
        return np.random.RandomState([self.choices.seed, zlib.crc32(task.encode()), length, *numbers])

    def with_pieces(
        self, draw: int, length: int, pieces: list[np.ndarray], depths: list[float]
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Returns a context with pieces at these depths, and [start, stop) of each."""
        prose = self.context(draw, length, less=sum(map(len, pieces)))
        body, spans = insert(prose, pieces, depths)
        shift = len(self.start)
        return np.concatenate([self.start, body]), [(first + shift, stop + shift) for first, stop in spans]


Contexts = list[tuple[str, list[Example]]]  # what tells a context from others of the task, and what it is asked


def needle(make: Maker, length: int, draw: int) -> Contexts:
    made = []
    for depth in make.choices.depths:
        random = make.random("needle", length, draw, round(depth * 1000))
        vault, code = VAULTS[random.randint(len(VAULTS))], _digits(random, CODE_DIGITS)
        context, [origin] = make.with_pieces(draw, length, [_fact(make, vault, code)], [depth])
        made.append((f"depth{depth:g}", [_ask(make, "needle", context, vault, code, depth, origin)]))
    return made


def multi_needle(make: Maker, length: int, draw: int) -> Contexts:
    random = make.random("multi_needle", length, draw)
    vaults = [VAULTS[index] for index in random.permutation(len(VAULTS))[:NUM_NEEDLES]]
    codes = [_digits(random, CODE_DIGITS) for _ in vaults]
    depths = [(index + 0.5) / NUM_NEEDLES for index in range(NUM_NEEDLES)]
    facts = [_fact(make, vault, code) for vault, code in zip(vaults, codes, strict=True)]
    context, origins = make.with_pieces(draw, length, facts, depths)
    return [("", [_ask(make, "multi_needle", context, *each)
                  for each in zip(vaults, codes, depths, origins, strict=True)])]


def key_value(make: Maker, length: int, draw: int) -> Contexts:
    num_pairs = make.choices.num_pairs
    random = make.random("key_value", length, draw, num_pairs)
    keys = [KEYS[index] for index in random.permutation(len(KEYS))[:num_pairs]]
    values = [f"{value:0{VALUE_DIGITS}}" for value in random.permutation(10**VALUE_DIGITS)[:num_pairs]]
    lines = [make.tokenizer.encode(f"{key}: {value}\n".encode()) for key, value in zip(keys, values, strict=True)]
    blank = make.tokenizer.encode(b"\n\n")
    block = np.concatenate([blank, *lines, blank[:1]])
    context, [(first, _)] = make.with_pieces(draw, length, [block], [0.5])
    starts = first + len(blank) + np.cumsum([0, *map(len, lines)])
    asked = []
    for index in sorted(random.permutation(num_pairs)[:NUM_ASKED]):
        question, answer = split_answer(
            make.tokenizer, f"\n\n{keys[index]}: ".encode(), values[index].encode())
        asked.append(Example("key_value", context, question, answer, VALUE_DIGITS, 0.5,
                             (int(starts[index]), int(starts[index + 1]))))
    return [("", asked)]


def copy(make: Maker, length: int, draw: int) -> Contexts:
    prose = make.context(draw, length)
    shift, blank = len(make.start), make.tokenizer.encode(b"\n\n").astype(np.int32)
    num_copies = min(MOST_COPIES, len(prose) // (2 * (CUE + COPIED)))
    if not num_copies:
        raise UsageError(f"--lengths: {length} tokens are too few for the test copy, which needs a context of "
                         f"{2 * (CUE + COPIED)} besides the {ROOM} of question and answer")
    depths = [(index + 0.5) / num_copies for index in range(num_copies)]
    spans = [(start, start + CUE + COPIED)
             for start in (round(depth * (len(prose) - CUE - COPIED)) for depth in depths)]
    # The control's text has others in place of the passages: those before it.
    longer = make.context(draw, length, less=-num_copies * (CUE + COPIED))
    is_kept = np.ones(len(longer), bool)
    for start, stop in spans:
        is_kept[len(longer) - len(prose) + start : len(longer) - len(prose) + stop] = False
    found, without = [], []
    for depth, (start, stop) in zip(depths, spans, strict=True):
        question, answer = np.concatenate([blank, prose[start : start + CUE]]), prose[start + CUE : stop]
        found.append(Example("copy", np.concatenate([make.start, prose]), question, answer, COPIED, depth,
                             (start + shift, stop + shift)))
        without.append(Example(
            "copy without source", np.concatenate([make.start, longer[is_kept]]), question, answer, COPIED))
    return [("", found), ("control", without)]


def position(make: Maker, length: int, draw: int) -> Contexts:
    text = np.concatenate([make.context(draw, length), make.prose.last(draw, CONTINUED + 1)])
    answer = text[-CONTINUED:]
    context = np.concatenate([make.start, text[: -CONTINUED - 1]])
    return [("", [Example("position", context, text[-CONTINUED - 1 : -CONTINUED], answer, CONTINUED)])]


def _digits(random: np.random.RandomState, count: int) -> str:
    return "".join(str(digit) for digit in random.randint(10, size=count))


def _statement(vault: str) -> str:
    return f"\n\nThe secret passcode of the {vault} vault is "


def _fact(make: Maker, vault: str, code: str) -> np.ndarray:
    return make.tokenizer.encode(f"{_statement(vault)}{code}.\n\n".encode()).astype(np.int32)


def _ask(
    make: Maker, task: str, context: np.ndarray, vault: str, code: str, depth: float, origin: tuple[int, int]
) -> Example:
    question, answer = split_answer(make.tokenizer, _statement(vault).encode(), code.encode())
    return Example(task, context, question, answer, CODE_DIGITS, depth, origin)


TASKS: dict[str, Callable[[Maker, int, int], Contexts]] = {
    "needle": needle, "multi_needle": multi_needle, "key_value": key_value, "copy": copy, "position": position}
