import io
import re

import numpy as np
import pytest
from rich.console import Console

from experiments.analysis.chunked_text import ChunkedText, StageChunks, Table
from experiments.pages.terminal import print_chunks, table_in_terminal

EVERY_BYTE = bytes(range(256)) + "é€😀\u202e\u2028\ufeff".encode()
SEQUENCE = re.compile(r"\x1b\[([0-9;]*)m")


def _chunked(text: bytes, *boundaries: list[int]) -> ChunkedText:
    stages = tuple(
        StageChunks(f"stage{index}", np.full(len(text), 0.5), np.isin(np.arange(len(text)), starts))
        for index, starts in enumerate(boundaries))
    return ChunkedText("t", text, stages)


def _print(chunked: ChunkedText, *, num_shown: int, is_coloured: bool) -> str:
    """Returns what a console narrower than most lines gets."""
    file = io.StringIO()
    console = Console(file=file, width=20, force_terminal=is_coloured, color_system="256" if is_coloured else None)
    print_chunks(chunked, console, num_shown=num_shown)
    return file.getvalue()


def _plain(text: bytes, *boundaries: list[int], num_shown: int = 2000) -> list[str]:
    """The chunks of each stage, without the legends."""
    shown = _print(_chunked(text, *boundaries), num_shown=num_shown, is_coloured=False)
    return re.split(r"stage\d: .*\n\n", shown)[1:]


def test_without_colour_chunks_are_cut_by_bars_stage_by_stage_outermost_first():
    outer, inner = _plain(b"def f(x):\n\treturn", [0, 4, 5, 11], [0, 5])
    assert outer.strip() == "def |f|(x):↵\n→   |return"
    assert inner.strip() == "def f|(x):↵\n→   return"


def test_the_legend_counts_chunks_and_says_how_much_is_shown():
    text = b"0123456789" * 200
    shown = _print(_chunked(text, [0, 5, 1000]), num_shown=7, is_coloured=False)
    assert shown.startswith("stage0: 3 chunks, 666.67 bytes per chunk; the first 7 of 2,000 bytes, each | is")
    assert shown.endswith("\n\n01234|56\n\n")
    whole = _print(_chunked(text, [0]), num_shown=2000, is_coloured=False)
    assert "; 2,000 bytes, each | is" in whole and whole.endswith(f"\n{text.decode()}\n\n")


@pytest.mark.parametrize(("num_shown", "expected"), [
    (0, ""), (1, "a"), (2, "a"), (3, "aé"), (6, "aé"), (7, "aé😀"), (8, "aé😀\\xff"), (9, "aé😀\\xff\\xf0")])
def test_a_text_is_shown_in_whole_characters(num_shown, expected):
    (shown,) = _plain("aé😀".encode() + b"\xff\xf0", [0], num_shown=num_shown)
    assert shown.strip() == expected


def test_a_character_with_a_boundary_inside_falls_apart_into_its_bytes():
    (shown,) = _plain("aéb".encode(), [0, 2])
    assert shown.strip() == "a\\xc3|\\xa9b"


@pytest.mark.parametrize("is_coloured", [True, False])
def test_no_text_commands_the_terminal_and_no_byte_is_lost(is_coloured):
    boundaries = list(range(0, len(EVERY_BYTE), 3))
    shown = _print(_chunked(EVERY_BYTE, boundaries), num_shown=10_000, is_coloured=is_coloured)
    assert bool(SEQUENCE.search(shown)) == is_coloured
    body = SEQUENCE.sub("", shown).split("\n\n", maxsplit=1)[1].removesuffix("\n\n")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\ufeff\ud800-\udfff]", body)
    if is_coloured:
        body = re.sub(r"→   ", "\\\\x09", body.replace("↵\n", "\\x0a"))
        read = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), body.encode())
        assert read == EVERY_BYTE


def test_neighbouring_chunks_have_different_backgrounds_and_no_line_ends_with_one():
    shown = _print(_chunked(b"ab\ncd\x01e", [0, 1, 4]), num_shown=99, is_coloured=True)
    background, drawn = "", []
    for text, codes in re.findall(r"([^\x1b]*)(?:\x1b\[([0-9;]*)m|$)", shown.split("\n\n", maxsplit=1)[1]):
        drawn += [(character, background) for character in text]
        if codes:
            found = re.search(r"48;5;(\d+)", codes)
            background = "" if codes == "0" else found[1] if found else background
    (first, second) = drawn[0][1], drawn[1][1]
    assert first and second and first != second
    assert drawn == [
        ("a", first), ("b", second), ("↵", second), ("\n", ""), ("c", second),
        *((character, first) for character in "d\\x01e"), ("\n", ""), ("\n", "")]


def test_a_table_is_aligned_with_titles_of_several_lines():
    table = Table(("", "bytes", "bits\nper byte"), (("none", "12", "1.5"), ("upper case", "1,200", "-")))
    assert table_in_terminal(table) == (
        "                       bits\n"
        "            bytes  per byte\n"
        "none           12       1.5\n"
        "upper case  1,200         -\n")
