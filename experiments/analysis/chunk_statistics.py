"""Statistics of a stage's boundaries in a text: lengths of chunks, probabilities, and the places they fall on.

A boundary is the byte that starts a chunk. It is compared with kinds of places, which are bytes of the text too:

  whitespace                      an ASCII space, tab, line feed, carriage return, vertical tab or form feed
  after whitespace                a byte other than whitespace, after whitespace
  identifier start                the first byte of a longest run of [A-Za-z0-9_], if it is a letter
  number start                    the first byte of a longest run of [0-9]; it may lie within an identifier
  line start                      the first byte of the text, or one after a line feed
  multi-byte character start      the first byte of a UTF-8 character of two to four bytes
  inside a multi-byte character   the other bytes of such a character; bytes that are not UTF-8 are in neither

Precision is the share of boundaries at such a place, recall the share of such places that are boundaries, and
base rate the share of all bytes that are such places. Precision over base rate is the lift, which is 1 for
boundaries that ignore the place. A quotient by zero is NaN.
"""
import math
from typing import NamedTuple

import numpy as np

from experiments.analysis.chunked_text import ChunkedText, StageChunks, Table, characters, chunk_lengths

PROBABILITY_BINS = 10  # of equal width, from 0 to 1


class PlaceStatistics(NamedTuple):
    place: str
    count: int        # such places in the text
    base_rate: float
    precision: float
    recall: float

    @property
    def lift(self) -> float:
        return _ratio(self.precision, self.base_rate)


class StageStatistics(NamedTuple):
    name: str
    num_chunks: int
    bytes_per_chunk: float      # mean
    longest_chunk: int          # bytes
    boundary_rate: float        # boundaries per byte or chunk that the stage saw
    prob_at_boundaries: float   # mean
    prob_elsewhere: float       # mean over the other positions that the stage saw
    prob_counts: np.ndarray     # [PROBABILITY_BINS] how many probabilities fall into each bin
    places: tuple[PlaceStatistics, ...]


def bits_per_byte(chunked: ChunkedText) -> float:
    """Returns the mean over the bytes whose nats are known: all but a first token that nothing stands before."""
    return _ratio(float(np.nansum(chunked.nats)), np.count_nonzero(~np.isnan(chunked.nats)) * math.log(2))


def stage_statistics(text: bytes, stage: StageChunks) -> StageStatistics:
    """Measures one stage; lengths count the chunk that begins the text even without a boundary."""
    prob, boundary, lengths = stage.boundary_prob, stage.is_boundary, chunk_lengths(stage)
    seen = ~np.isnan(prob)
    counts, _ = np.histogram(prob[seen], bins=PROBABILITY_BINS, range=(0, 1))
    return StageStatistics(
        stage.name, len(lengths), _ratio(len(text), len(lengths)), int(lengths.max(initial=0)),
        boundary_rate(stage), _mean(prob[seen & boundary]), _mean(prob[seen & ~boundary]), counts,
        tuple(_at_places(boundary, name, is_place) for name, is_place in places(text).items()))


def boundary_rate(stage: StageChunks) -> float:
    """Returns boundaries per token that the stage saw; an inner stage sees the first byte of each outer chunk."""
    return _ratio(int(stage.is_boundary.sum()), int((~np.isnan(stage.boundary_prob)).sum()))


def boundary_agreement(first: StageChunks, second: StageChunks) -> float:
    """Returns the F1 score between the boundaries of two texts of equal length: 1 if all are the same."""
    both = int((first.is_boundary & second.is_boundary).sum())
    return _ratio(2 * both, int(first.is_boundary.sum() + second.is_boundary.sum()))


def places(text: bytes) -> dict[str, np.ndarray]:
    """Returns a mask of the text's bytes, [num_bytes] bool, for every kind of place."""
    byte = np.frombuffer(text, np.uint8)
    is_space, is_digit = _is_one_of(byte, b" \t\n\r\v\f"), _is_one_of(byte, b"0123456789")
    is_letter = ((byte | 32) >= ord("a")) & ((byte | 32) <= ord("z"))  # 32 lies between upper and lower case
    is_word = is_letter | is_digit | _is_one_of(byte, b"_")
    lengths = np.array([len(character) for character in characters(text)], int)
    is_wide = np.repeat(lengths, lengths) > 1
    is_first = np.isin(np.arange(len(byte)), np.cumsum([0, *lengths]))
    return {
        "whitespace": is_space,
        "after whitespace": _before(is_space) & ~is_space,
        "identifier start": is_letter & ~_before(is_word),
        "number start": is_digit & ~_before(is_digit),
        "line start": _before(byte == ord("\n"), first=True),
        "multi-byte character start": is_wide & is_first,
        "inside a multi-byte character": is_wide & ~is_first,
    }


def stage_table(stages: tuple[StageStatistics, ...]) -> Table:
    header = ("", "chunks", "bytes\nper chunk", "longest\nchunk", "boundary\nrate", "mean p at\nboundaries",
              "mean p\nelsewhere", "p from\n0 to 1")
    return Table(header, tuple(
        (stage.name, f"{stage.num_chunks:,}", number(stage.bytes_per_chunk), f"{stage.longest_chunk:,}",
         number(stage.boundary_rate, 3), number(stage.prob_at_boundaries, 3), number(stage.prob_elsewhere, 3),
         bars(stage.prob_counts))
        for stage in stages))


def place_table(stage: StageStatistics) -> Table:
    header = (stage.name, "places", "base rate", "precision", "lift", "recall")
    return Table(header, tuple(
        (at.place, f"{at.count:,}", number(at.base_rate, 3), number(at.precision, 3), number(at.lift),
         number(at.recall, 3))
        for at in stage.places))


def number(value: float, decimals: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"


def bars(counts: np.ndarray) -> str:
    """Draws a histogram in one line of text; the highest bar is full, an empty one is a dot."""
    heights = np.ceil(8 * counts / max(counts.max(initial=0), 1)).astype(int)
    return "".join("·▁▂▃▄▅▆▇█"[height] for height in heights)


def _at_places(boundary: np.ndarray, name: str, is_place: np.ndarray) -> PlaceStatistics:
    count, both = int(is_place.sum()), int((boundary & is_place).sum())
    return PlaceStatistics(
        name, count, base_rate=_ratio(count, len(is_place)), precision=_ratio(both, int(boundary.sum())),
        recall=_ratio(both, count))


def _before(mask: np.ndarray, *, first: bool = False) -> np.ndarray:
    """Shifts a mask by one, so that entry i is that of byte i - 1; entry 0 is `first`."""
    return np.concatenate([[first], mask])[: len(mask)]


def _is_one_of(byte: np.ndarray, choices: bytes) -> np.ndarray:
    return np.isin(byte, np.frombuffer(choices, np.uint8))


def _mean(values: np.ndarray) -> float:
    return _ratio(float(values.sum()), len(values))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
