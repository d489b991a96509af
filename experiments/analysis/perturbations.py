"""Small changes to a text, and their effects on a model's boundaries and bits per byte.

  none               the text as it is
  upper case         every letter in upper case, if that has as many bytes
  lower case         every letter in lower case, likewise
  swapped case       every letter in the other case, likewise
  typos              5 % of the letters, at least one, become another letter of the text with as many bytes
  doubled letters    every letter twice
  inserted run       100 times the byte "a" in the middle
  no whitespace      without ASCII whitespace

The draws of "typos" are seeded: a text always gets the same ones. Where a change keeps the number of bytes, byte i
still corresponds to byte i, and boundaries can be compared position by position.
"""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.analysis.chunk_statistics import Table, bits_per_byte, boundary_agreement, boundary_rate, number
from experiments.analysis.chunked_text import ChunkedText, characters, chunk_lengths

TYPO_RATE = 0.05  # of all letters
RUN = b"a" * 100


class Effect(NamedTuple):
    """Results of a model on a changed text; the tuples have one entry per stage, outermost first."""
    name: str
    num_bytes: int
    bits_per_byte: float
    boundary_rates: tuple[float, ...]   # boundaries per byte or chunk that the stage saw
    bytes_per_chunk: tuple[float, ...]
    agreements: tuple[float, ...]       # F1 with the boundaries of the text unchanged; NaN where bytes moved


def perturb(text: bytes) -> list[tuple[str, bytes]]:
    """Returns (name, changed text) for every change; the first is "none"."""
    return [(name, change(text)) for name, (change, _) in _CHANGES.items()]


def effects(chunked: list[ChunkedText]) -> list[Effect]:
    """Compares a model's results on the texts of `perturb`, in their order."""
    unchanged = chunked[0]
    return [_effect(unchanged, changed, _CHANGES[changed.title][1]) for changed in chunked]


def effect_table(changes: list[Effect], stage_names: tuple[str, ...]) -> Table:
    header = ["", "bytes", "bits\nper byte"]
    for name in stage_names:
        header += [f"{name}\nrate", f"{name} bytes\nper chunk", f"{name}\nF1"]
    rows = []
    for change in changes:
        row = [change.name, f"{change.num_bytes:,}", number(change.bits_per_byte, 3)]
        stages = zip(change.boundary_rates, change.bytes_per_chunk, change.agreements, strict=True)
        for rate, length, agreement in stages:
            row += [number(rate, 3), number(length), number(agreement, 3)]
        rows.append(tuple(row))
    return Table(tuple(header), tuple(rows))


def _effect(unchanged: ChunkedText, changed: ChunkedText, keeps_positions: bool) -> Effect:
    lengths = [chunk_lengths(stage) for stage in changed.stages]
    agreements = tuple(boundary_agreement(before, after) if keeps_positions else np.nan
                       for before, after in zip(unchanged.stages, changed.stages, strict=True))
    return Effect(
        changed.title, len(changed.text), bits_per_byte(changed),
        boundary_rates=tuple(boundary_rate(stage) for stage in changed.stages),
        bytes_per_chunk=tuple(each.mean() if len(each) else np.nan for each in lengths),
        agreements=agreements)


def _change_case(convert: Callable[[str], str]) -> Callable[[bytes], bytes]:
    def change(text: bytes) -> bytes:
        return b"".join(_same_length(character, convert) for character in characters(text))

    return change


def _same_length(character: bytes, convert: Callable[[str], str]) -> bytes:
    converted = convert(_decoded(character)).encode("utf-8", "surrogateescape")
    return converted if len(converted) == len(character) else character


def _add_typos(text: bytes) -> bytes:
    pieces = list(characters(text))
    letters = [index for index, piece in enumerate(pieces) if _decoded(piece).isalpha()]
    alphabet = sorted({pieces[index] for index in letters})
    # RandomState rather than Generator: numpy promises never to change its numbers.
    draw = np.random.RandomState(0)
    for index in draw.permutation(letters)[: max(1, round(TYPO_RATE * len(letters)))]:
        old = pieces[index]
        others = [letter for letter in alphabet if len(letter) == len(old) and letter != old]
        if others:
            pieces[index] = others[draw.randint(len(others))]
    return b"".join(pieces)


def _double_letters(text: bytes) -> bytes:
    return b"".join(piece * 2 if _decoded(piece).isalpha() else piece for piece in characters(text))


def _insert_run(text: bytes) -> bytes:
    pieces = list(characters(text))
    middle = len(pieces) // 2  # in characters: a run inside a character would break it
    return b"".join([*pieces[:middle], RUN, *pieces[middle:]])


def _remove_whitespace(text: bytes) -> bytes:
    return text.translate(None, delete=b" \t\n\r\v\f")


def _decoded(character: bytes) -> str:
    return character.decode("utf-8", "surrogateescape")


# name: (the change, whether byte i of the result corresponds to byte i of the text)
_CHANGES: dict[str, tuple[Callable[[bytes], bytes], bool]] = {
    "none": (lambda text: text, True),
    "upper case": (_change_case(str.upper), True),
    "lower case": (_change_case(str.lower), True),
    "swapped case": (_change_case(str.swapcase), True),
    "typos": (_add_typos, True),
    "doubled letters": (_double_letters, False),
    "inserted run": (_insert_run, False),
    "no whitespace": (_remove_whitespace, False),
}
