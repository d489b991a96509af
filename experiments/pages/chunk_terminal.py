"""Text with its chunks coloured, for a terminal; and tables for it.

Every byte of what is shown is there once per stage: characters as themselves, a newline as ↵ before the line
break, a tab as → and blanks, and bytes that have no glyph of their own (control characters, invalid UTF-8, a
character cut in two by a boundary) as \\x1b, so that no text can command the terminal.
"""
import itertools

import numpy as np

from experiments.analysis.chunk_statistics import Table
from experiments.pages.chunk_html import ChunkedText, characters, chunk_edges, has_glyph
from experiments.pages.text_table import aligned

# Each background comes with its ink, so that both can be read on dark terminals and on light ones.
_COLOURS = ("\x1b[38;5;16;48;5;153m", "\x1b[38;5;16;48;5;223m")  # black on light blue, on light amber
_MARK, _INK, _RESET = "\x1b[38;5;241m", "\x1b[38;5;16m", "\x1b[0m"


def chunks_in_terminal(chunked: ChunkedText, *, num_shown: int, is_coloured: bool) -> str:
    """Returns one block of lines per stage, outermost first, each under a legend; coloured, or cut by "|".

    Args:
      num_shown: bytes of the text to show; a character that would be cut there is left out.
    """
    num_bytes = _whole_characters(chunked.text, num_shown)
    amount = f"{len(chunked.text):,} bytes"
    if num_bytes < len(chunked.text):
        amount = f"the first {num_bytes:,} of {amount}"
    cut = "each change of colour is a boundary" if is_coloured else "each | is a boundary"
    blocks = []
    for stage in chunked.stages:
        edges = chunk_edges(stage)
        legend = (f"{stage.name}: {len(edges) - 1:,} chunks, {len(chunked.text) / max(len(edges) - 1, 1):.2f} "
                  f"bytes per chunk; {amount}, {cut}")
        blocks.append(f"{legend}\n\n{_chunks(chunked.text[:num_bytes], edges, is_coloured)}\n")
    return "\n".join(blocks)


def table_in_terminal(table: Table) -> str:
    """Returns the table in aligned columns, the first to the left and the others to the right."""
    titles = [title.split("\n") for title in table.header]
    height = max(map(len, titles))
    titles = zip(*[[""] * (height - len(title)) + title for title in titles], strict=True)
    return "\n".join(aligned([*titles, *table.rows])) + "\n"


def _chunks(text: bytes, edges: np.ndarray, is_coloured: bool) -> str:
    shown = []
    for index, (start, stop) in enumerate(itertools.pairwise(edges)):
        if start >= len(text):
            break
        # Decoded chunk by chunk, a character with a boundary inside falls apart into its bytes by itself.
        chunk = characters(text[start:stop])
        glyphs = [_glyph(character, is_coloured, _COLOURS[index % 2]) for character in chunk]
        shown.append("".join([_COLOURS[index % 2], *glyphs, _RESET] if is_coloured else glyphs))
    return "".join(shown) if is_coloured else "|".join(shown)


def _glyph(character: bytes, is_coloured: bool, colour: str) -> str:
    if character == b"\n":
        # Without a background at the end of the line, or terminals fill the rest of the line with it.
        return f"{_MARK}↵{_RESET}\n{colour}" if is_coloured else "↵\n"
    if has_glyph(character):
        return character.decode()
    mark = "→   " if character == b"\t" else "".join(f"\\x{byte:02x}" for byte in character)
    return f"{_MARK}{mark}{_INK}" if is_coloured else mark


def _whole_characters(text: bytes, limit: int) -> int:
    """Returns how many bytes the whole characters take that end within the first `limit`."""
    num_bytes = 0
    for character in characters(text[: limit + 3]):  # the longest character has four bytes
        if num_bytes + len(character) > limit:
            break
        num_bytes += len(character)
    return num_bytes
