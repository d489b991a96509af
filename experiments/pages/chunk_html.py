"""Text with its chunks coloured, as an HTML fragment: one panel per stage, one shown at a time.

Every byte of the text is in the fragment, exactly once per stage. Characters are shown as themselves; bytes
that have no glyph of their own (control characters, invalid UTF-8, a character cut in two by a boundary) are
shown as \\x1b. Neighbouring chunks alternate between two backgrounds; a character is underlined the more
strongly the more probable a boundary before it, and shows that probability while the pointer is on it. Tokens that
are not bytes have the first panel: their characters are underlined by the token's nats, and show those.
"""
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from experiments.analysis.chunked_text import (
    ChunkedText,
    StageChunks,
    characters,
    chunk_edges,
    chunk_lengths,
    escaped,
    has_glyph,
)
from experiments.pages.html import render_part

FULL_NATS = 10.0  # of a token whose underline is as strong as can be


class Cell(NamedTuple):
    """One character of a text, or one of its bytes, and what a page shows for it."""
    shown: str
    kind: str = ""       # class of what is not a plain glyph: "newline", "tab" or "hex"
    after: str = ""      # what follows outside of the mark, so that copied text is the text
    probs: str = ""      # probabilities of a boundary at its bytes; "" where none is known
    nats: str = ""       # of its token; "" where none is known
    strength: str = ""   # of the underline, from 0 to 1: the largest of probs, or nats / FULL_NATS


def render_chunked_text(chunked: ChunkedText) -> Markup:
    """Returns a fragment that needs page.css, and nothing else."""
    panels = [] if chunked.token_starts is None else [_token_panel(chunked)]
    panels += [_panel(chunked.text, stage) for stage in chunked.stages]
    return render_part("parts.html.jinja", "chunked_text", chunked.title, panels, _cells(chunked.text))


def visible_text(text: bytes) -> Markup:
    """Returns any bytes as HTML to stand in a <pre>: escaped, with marks for what has no glyph."""
    return render_part("parts.html.jinja", "glyphs", _cells(text))


def _panel(text: bytes, stage: StageChunks) -> dict[str, object]:
    lengths = chunk_lengths(stage)
    size = f"{lengths.mean():.2f} bytes per chunk" if len(lengths) else "no text"
    # Decoded chunk by chunk, a character with a boundary inside falls apart into its bytes by itself.
    chunks = [_cells(text[start:stop], stage.boundary_prob[start:stop])
              for start, stop in pairwise(chunk_edges(stage))]
    return {"name": stage.name, "size": size, "chunks": chunks}


def _token_panel(chunked: ChunkedText) -> dict[str, object]:
    edges, chunks = chunk_edges(chunked.tokens), []
    for (start, stop), nats in zip(pairwise(edges), chunked.token_nats(), strict=True):
        cells = list(_cells(chunked.text[start:stop]))
        if not np.isnan(nats):
            shown, strength = f"{nats:.2f}", f"{min(nats / FULL_NATS, 1):.2f}"
            cells = [cell._replace(nats=shown, strength=strength) for cell in cells]
        chunks.append(cells)
    size = f"{len(chunked.text) / max(len(chunks), 1):.2f} bytes per token"
    return {"name": "tokens", "size": size, "chunks": chunks}


def _cells(text: bytes, boundary_prob: np.ndarray | None = None) -> Iterator[Cell]:
    position = 0
    for character in characters(text):
        cell = _cell(character)
        if boundary_prob is not None:
            prob = boundary_prob[position:position + len(character)]
            prob = prob[~np.isnan(prob)]
            if len(prob):  # one number per byte of the character
                cell = cell._replace(probs=" ".join(f"{p:.2f}" for p in prob), strength=f"{prob.max():.2f}")
        position += len(character)
        yield cell


def _cell(character: bytes) -> Cell:
    if character == b"\n":
        return Cell("", "newline", after="\n")  # the style sheet draws the mark
    if character == b"\t":
        return Cell("", "tab", after="\t")
    return Cell(character.decode()) if has_glyph(character) else Cell(escaped(character), "hex")
