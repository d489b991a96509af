"""Counts checked by hand, on texts short enough to count on one's fingers."""
import math
import string

import numpy as np
import pytest

from experiments.analysis.chunk_statistics import (
    bars,
    bits_per_byte,
    boundary_agreement,
    boundary_rate,
    number,
    place_table,
    places,
    stage_statistics,
    stage_table,
)
from experiments.analysis.chunked_text import ChunkedText, StageChunks

CODE = b"if x2 ==\n\t10:  _y1"
# Bytes 8 and 9 are the line feed and the tab; the underscore is byte 15.


def _stage(text: bytes, boundaries: list[int], prob=None) -> StageChunks:
    is_boundary = np.isin(np.arange(len(text)), boundaries)
    return StageChunks("stage0", np.where(is_boundary, 0.9, 0.2) if prob is None else np.array(prob), is_boundary)


@pytest.mark.parametrize(("place", "expected"), [
    ("whitespace", [2, 5, 8, 9, 13, 14]),
    ("after whitespace", [3, 6, 10, 15]),
    ("identifier start", [0, 3]),  # _y1 begins with no letter, and its y begins no run
    ("number start", [4, 10, 17]),
    ("line start", [0, 9]),
    ("multi-byte character start", []),
    ("inside a multi-byte character", []),
])
def test_places_in_code(place, expected):
    assert np.flatnonzero(places(CODE)[place]).tolist() == expected


@pytest.mark.parametrize(("text", "starts", "inside"), [
    ("aé€😀b".encode(), [1, 3, 6], [2, 4, 5, 7, 8, 9]),
    (b"\xffa\xa9\xc3", [], []),                 # stray bytes are in no character
    ("€".encode()[:2] + "é".encode(), [2], [3]),  # nor is a beginning without its end
    (b"", [], []),
])
def test_places_in_utf_8(text, starts, inside):
    found = places(text)
    assert np.flatnonzero(found["multi-byte character start"]).tolist() == starts
    assert np.flatnonzero(found["inside a multi-byte character"]).tolist() == inside
    assert all(mask.shape == (len(text),) and mask.dtype == bool for mask in found.values())


def test_whitespace_identifiers_and_digits_are_ascii_and_bytes_that_look_alike_are_not():
    every_byte = bytes(range(256))
    found = places(every_byte)
    assert bytes(np.flatnonzero(found["whitespace"]).tolist()) == b"\t\n\v\f\r "
    apart = places(b" ".join(bytes([byte]) for byte in every_byte))
    letters = (string.ascii_uppercase + string.ascii_lowercase).encode()
    assert bytes(np.flatnonzero(apart["identifier start"][::2]).tolist()) == letters
    assert bytes(np.flatnonzero(apart["number start"][::2]).tolist()) == b"0123456789"


def test_precision_recall_base_rate_and_lift():
    """Boundaries at i, the space after it, x, the line's tab and y: two of five are at identifiers."""
    statistics = {at.place: at for at in stage_statistics(CODE, _stage(CODE, [0, 2, 3, 9, 16])).places}
    identifier = statistics["identifier start"]
    assert (identifier.count, identifier.precision, identifier.recall) == (2, 2 / 5, 1.0)
    assert identifier.base_rate == 2 / 18 and identifier.lift == pytest.approx((2 / 5) / (2 / 18))
    whitespace = statistics["whitespace"]
    assert (whitespace.count, whitespace.precision, whitespace.recall) == (6, 2 / 5, 2 / 6)
    inside = statistics["inside a multi-byte character"]
    assert (inside.count, inside.base_rate, inside.precision) == (0, 0.0, 0.0)
    assert math.isnan(inside.recall) and math.isnan(inside.lift)


def test_boundaries_inside_characters_are_their_share_of_all_boundaries():
    text = "aé€".encode()
    statistics = {at.place: at for at in stage_statistics(text, _stage(text, [0, 2, 3, 5])).places}
    assert statistics["inside a multi-byte character"].precision == 2 / 4
    assert statistics["inside a multi-byte character"].recall == 2 / 3


def test_a_stage_in_numbers():
    """The inner stage saw six of eight bytes; the first byte opens a chunk though it is no boundary."""
    prob = [0.1, np.nan, 0.8, 0.35, np.nan, 1.0, 0.0, 0.55]
    stage = stage_statistics(b"abcdefgh", _stage(b"abcdefgh", [2, 5, 7], prob))
    assert (stage.num_chunks, stage.bytes_per_chunk, stage.longest_chunk) == (4, 2.0, 3)
    assert stage.boundary_rate == 3 / 6
    assert stage.prob_at_boundaries == pytest.approx((0.8 + 1.0 + 0.55) / 3)
    assert stage.prob_elsewhere == pytest.approx((0.1 + 0.35 + 0.0) / 3)
    assert stage.prob_counts.tolist() == [1, 1, 0, 1, 0, 1, 0, 0, 1, 1]


def test_what_cannot_be_said_is_nan_and_written_as_a_dash():
    empty = stage_statistics(b"", _stage(b"", []))
    assert empty.num_chunks == 0 and empty.longest_chunk == 0
    assert all(map(math.isnan, (empty.bytes_per_chunk, empty.boundary_rate, empty.prob_elsewhere)))
    never = stage_statistics(b"abc", _stage(b"abc", []))
    assert never.num_chunks == 1 and math.isnan(never.prob_at_boundaries)
    assert math.isnan(never.places[0].precision)
    assert number(math.nan) == "-" and number(0.5, 3) == "0.500"
    assert math.isnan(bits_per_byte(ChunkedText("t", b"", (), nats=np.zeros(0))))


def test_bits_per_byte_are_mean_nats_over_ln_2():
    assert bits_per_byte(ChunkedText("t", b"ab", (), nats=np.log([2.0, 8.0]))) == pytest.approx(2.0)


def test_agreement_is_the_harmonic_mean_of_precision_and_recall():
    text = b"abcdefgh"
    first, second = _stage(text, [0, 2, 4, 6]), _stage(text, [0, 3, 4])
    precision, recall = 2 / 3, 2 / 4
    expected = 2 * precision * recall / (precision + recall)
    assert boundary_agreement(first, second) == pytest.approx(expected)
    assert boundary_agreement(second, first) == pytest.approx(expected)
    assert boundary_agreement(first, first) == 1.0
    assert boundary_rate(first) == 4 / 8


def test_bars_are_dots_only_where_nothing_is():
    assert bars(np.array([0, 1, 400, 800])) == "·▁▄█"
    assert bars(np.zeros(3, int)) == "···"


def test_tables_have_a_title_for_every_column():
    stage = stage_statistics(CODE, _stage(CODE, [0, 3]))
    for table in (stage_table((stage,)), place_table(stage)):
        assert all(len(row) == len(table.header) for row in table.rows)
    assert [row[0] for row in place_table(stage).rows] == list(places(CODE))
