"""A text with the chunks that a model cuts it into, byte by byte, and tables about it."""
import dataclasses
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class StageChunks:
    """One level of the hierarchy, aligned with the bytes of the text: entry i speaks of text[i]."""
    name: str
    boundary_prob: np.ndarray  # [num_bytes] in [0, 1]; NaN where this stage saw no token at that byte
    is_boundary: np.ndarray    # [num_bytes] bool; True starts a chunk at that byte


@dataclasses.dataclass(frozen=True)
class ChunkedText:
    """A text and its chunks at every stage.

    Attributes:
      stages: outermost first; () for a model that does not chunk.
      nats: [num_bytes] -log p of each byte after those before it; None = not known. A token's are spread evenly
        over its bytes, so that sums stay; NaN where nothing stands before the first token.
      token_starts: [num_bytes] bool, True at the first byte of each token; None where tokens are bytes.
    """
    title: str
    text: bytes
    stages: tuple[StageChunks, ...]
    nats: np.ndarray | None = None
    token_starts: np.ndarray | None = None

    @property
    def tokens(self) -> StageChunks:
        """The tokens as chunks; only for a text that has some."""
        return StageChunks("tokens", np.full(len(self.text), np.nan), self.token_starts)

    def token_nats(self) -> np.ndarray:
        """Returns the nats of each token, [num_tokens]."""
        return np.add.reduceat(self.nats, np.flatnonzero(self.token_starts)) if self.text else self.nats

    def __post_init__(self) -> None:
        arrays = {"nats": self.nats, "token_starts": self.token_starts}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        for stage in self.stages:
            arrays |= {f"boundary_prob of {stage.name}": stage.boundary_prob,
                       f"is_boundary of {stage.name}": stage.is_boundary}
        for name, array in arrays.items():
            if array.shape != (len(self.text),):
                raise ValueError(f"{name} has shape {array.shape}; "
                                 f"the text {self.title!r} needs ({len(self.text)},), one entry per byte")


class Table(NamedTuple):
    """Rows of text for the terminal and the page alike; all columns but the first hold numbers.

    A title in the header may have several lines.
    """
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def chunk_lengths(stage: StageChunks) -> np.ndarray:
    """Returns the bytes in each chunk, in order. [num_chunks]"""
    return np.diff(chunk_edges(stage))


def chunk_edges(stage: StageChunks) -> np.ndarray:
    """Returns the first byte of each chunk and, last, the length of the text. [num_chunks + 1]"""
    num_bytes = len(stage.is_boundary)
    if not num_bytes:
        return np.zeros(1, int)
    inner = np.flatnonzero(stage.is_boundary[1:]) + 1  # the first byte starts a chunk, marked or not
    return np.concatenate([[0], inner, [num_bytes]])


def characters(text: bytes) -> Iterator[bytes]:
    """Splits bytes into UTF-8 characters; a byte that belongs to none stands alone. Loses nothing."""
    for character in text.decode("utf-8", "surrogateescape"):
        yield character.encode("utf-8", "surrogateescape")


def has_glyph(character: bytes) -> bool:
    """Tells whether this UTF-8 character, or stray byte, shows as itself and moves nothing around it."""
    if character == b" ":
        return True
    # Z: other blanks and line separators. C: controls, marks that turn the writing direction, unassigned
    # code points, and the lone surrogates which stand for bytes that are not UTF-8.
    return unicodedata.category(character.decode("utf-8", "surrogateescape"))[0] not in "ZC"


def escaped(character: bytes) -> str:
    """Writes bytes without a glyph as \\x1b."""
    return "".join(f"\\x{byte:02x}" for byte in character)
