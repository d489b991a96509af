import math

import numpy as np
import pytest

from experiments.analysis.chunked_text import ChunkedText, StageChunks
from experiments.analysis.perturbations import RUN, effect_table, effects, perturb

TEXT = "Straße: grün ß, ŉ I\u0307 10 x\n\tÀÉ".encode() + b"\xff\xc3z"
LONG = b"The quick brown fox jumps over the lazy dog. " * 20


def _changed(text: bytes) -> dict[str, bytes]:
    return dict(perturb(text))


def test_case_changes_reach_letters_of_every_script_and_move_no_byte():
    """The upper case of ŉ has more bytes: it stays. That of ß has as many."""
    changed = _changed(TEXT)
    assert changed["none"] == TEXT
    assert changed["upper case"] == "STRASSE: GRÜN SS, ŉ I\u0307 10 X\n\tÀÉ".encode() + b"\xff\xc3Z"
    assert changed["lower case"] == "straße: grün ß, ŉ i\u0307 10 x\n\tàé".encode() + b"\xff\xc3z"
    assert changed["swapped case"] == "sTRASSE: GRÜN SS, ŉ i\u0307 10 X\n\tàé".encode() + b"\xff\xc3Z"


def test_typos_replace_a_twentieth_of_the_letters_by_other_letters_of_the_text():
    changed = _changed(LONG)["typos"]
    differs = [(old, new) for old, new in zip(LONG, changed, strict=True) if old != new]
    assert len(differs) == round(0.05 * sum(map(str.isalpha, LONG.decode())))
    assert all(chr(old).isalpha() and chr(new).isalpha() and new in LONG for old, new in differs)
    assert len(set(differs)) > 20  # not one typo over and over


def test_typos_are_always_the_same_at_least_one_and_leave_characters_whole():
    text = "юgяh, жk€" * 40
    changed = _changed(text.encode())["typos"]
    assert changed == _changed(text.encode())["typos"] != text.encode()
    assert [len(c.encode()) for c in changed.decode()] == [len(c.encode()) for c in text]
    assert _changed(b"ab")["typos"] in (b"aa", b"bb")


def test_letters_are_doubled_and_whitespace_is_removed():
    assert _changed(TEXT)["doubled letters"] == (
        "SSttrraaßßee: ggrrüünn ßß, ŉŉ II\u0307 10 xx\n\tÀÀÉÉ".encode() + b"\xff\xc3zz")
    assert _changed(TEXT)["no whitespace"] == "Straße:grünß,ŉI\u030710xÀÉ".encode() + b"\xff\xc3z"


def test_a_run_is_inserted_between_two_characters_in_the_middle():
    assert _changed("€€€€".encode())["inserted run"] == "€€".encode() + RUN + "€€".encode()
    assert RUN == b"a" * 100


@pytest.mark.parametrize("text", [b"", b"\n", b"1", b"q", b"\xff", bytes(range(256))])
def test_any_text_can_be_changed(text):
    for name, changed in perturb(text):
        if name in ("none", "upper case", "lower case", "swapped case", "typos"):
            assert len(changed) == len(text), name


def _read(name: str, text: bytes, boundaries: list[int], nats: float) -> ChunkedText:
    boundary = np.isin(np.arange(len(text)), boundaries)
    outer = StageChunks("stage0", boundary.astype(float), boundary)
    inner = StageChunks("stage1", np.where(boundary, 1.0, np.nan), boundary & (np.arange(len(text)) == 0))
    return ChunkedText(name, text, (outer, inner), nats=np.full(len(text), nats * math.log(2)))


def test_effects_compare_with_the_unchanged_text_where_no_byte_moved():
    chunked = [
        _read("none", b"one two.", [0, 4], 2.0), _read("upper case", b"ONE TWO.", [0, 3, 4, 7], 3.0),
        _read("no whitespace", b"onetwo.", [0, 3], 2.5)]
    none, upper, removed = effects(chunked)
    assert (none.bits_per_byte, upper.bits_per_byte, removed.bits_per_byte) == pytest.approx((2.0, 3.0, 2.5))
    assert none.agreements == (1.0, 1.0)
    assert upper.agreements == pytest.approx((2 * 2 / (2 + 4), 1.0))
    assert all(map(math.isnan, removed.agreements)) and removed.num_bytes == 7
    assert none.boundary_rates == (2 / 8, 1 / 2) and upper.boundary_rates == (4 / 8, 1 / 4)
    assert none.bytes_per_chunk == (4.0, 8.0) and removed.bytes_per_chunk == (3.5, 7.0)

    table = effect_table([none, upper, removed], ("stage0", "stage1"))
    assert table.rows[1] == ("upper case", "8", "3.000", "0.500", "2.00", "0.667", "0.250", "8.00", "1.000")
    assert table.rows[2][-1] == "-" and len(table.header) == len(table.rows[0])


def test_a_text_of_which_nothing_remains_has_dashes():
    chunked = [_read("none", b" \n", [0], 2.0), _read("no whitespace", b"", [], 0.0)]
    (_, empty) = effect_table(effects(chunked), ("stage0", "stage1")).rows
    assert empty == ("no whitespace", "0", *"-------")
