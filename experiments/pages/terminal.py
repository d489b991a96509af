"""Text with its chunks coloured, for a terminal; and tables for it.

Every byte of what is shown is there once per stage: characters as themselves, a newline as ↵ before the line
break, a tab as → and blanks, and bytes that have no glyph of their own (control characters, invalid UTF-8, a
character cut in two by a boundary) as \\x1b, so that no text can command the terminal.
"""
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from experiments.analysis.chunked_text import (
    ChunkedText,
    StageChunks,
    Table,
    characters,
    chunk_edges,
    escaped,
    has_glyph,
)
from experiments.pages.tables import aligned

# Each background comes with its ink, so that both can be read on dark terminals and on light ones.
_BACKGROUNDS = ("color(153)", "color(223)")  # light blue, light amber
_INK, _MARK = "color(16)", "color(241)"


def open_console() -> Console:
    """Returns a console on stdout: coloured on a terminal that can, unless NO_COLOR is set."""
    console = Console()
    # rich counts 16 colours for TERM=xterm, among which both backgrounds become white.
    return Console(color_system="256") if console.color_system == "standard" else console


def print_chunks(chunked: ChunkedText, console: Console, *, num_shown: int) -> None:
    """Prints one block of lines per stage, outermost first, each under a legend; coloured, or cut by "|".

    Args:
      console: decides about colours; one without them (a pipe, NO_COLOR) gets the bars.
      num_shown: bytes of the text to show; a character that would be cut there is left out.
    """
    for stage in chunked.stages:
        _print_cut(chunked.text, stage, console, num_shown=num_shown, unit="chunk")


def print_tokens(chunked: ChunkedText, console: Console, *, num_shown: int) -> None:
    """Prints the tokens of a text that has some as `print_chunks` does chunks, each with its nats after it."""
    nats = ["-" if np.isnan(each) else f"{each:.1f}" for each in chunked.token_nats()]
    _print_cut(chunked.text, chunked.tokens, console, num_shown=num_shown, unit="token", notes=nats)


def _print_cut(
    text: bytes, stage: StageChunks, console: Console, *, num_shown: int, unit: str, notes: Sequence[str] = ()
) -> None:
    is_coloured = console.color_system is not None and not console.no_color
    num_bytes = _whole_characters(text, num_shown)
    amount = f"{len(text):,} bytes"
    if num_bytes < len(text):
        amount = f"the first {num_bytes:,} of {amount}"
    cut = "each change of colour is a boundary" if is_coloured else "each | is a boundary"
    if notes:
        cut += ", with the nats of each token after it"
    num_chunks = len(chunk_edges(stage)) - 1
    counted = f"{num_chunks:,} {unit}s, " if notes else f"{stage.name}: {num_chunks:,} {unit}s, "
    legend = f"{counted}{len(text) / max(num_chunks, 1):.2f} bytes per {unit}; {amount}, {cut}\n"
    chunks = list(_chunks(text[:num_bytes], stage))
    if notes:
        chunks = [chunk.append(f" {note}" if is_coloured else f"[{note}]", _MARK)
                  for chunk, note in zip(chunks, notes, strict=False)]
    shown = Text().join(chunks) if is_coloured else Text("|".join(chunk.plain for chunk in chunks))
    for each in (Text(legend), shown, Text()):
        console.print(each, soft_wrap=True)  # as it is: no line broken, no blanks at its end dropped


def table_in_terminal(table: Table) -> str:
    """Returns the table in aligned columns, the first to the left and the others to the right."""
    titles = [title.split("\n") for title in table.header]
    height = max(map(len, titles))
    titles = zip(*[[""] * (height - len(title)) + title for title in titles], strict=True)
    return "\n".join(aligned([*titles, *table.rows])) + "\n"


def _chunks(text: bytes, stage: StageChunks) -> Iterator[Text]:
    backgrounds = itertools.cycle(_BACKGROUNDS)
    for (start, stop), background in zip(itertools.pairwise(chunk_edges(stage)), backgrounds, strict=False):
        if start >= len(text):
            return
        chunk = Text(style=f"{_INK} on {background}")
        # Decoded chunk by chunk, a character with a boundary inside falls apart into its bytes by itself.
        for character in characters(text[start:stop]):
            if character == b"\n":
                chunk.append("↵", _MARK).append("\n")
            elif has_glyph(character):
                chunk.append(character.decode())
            else:
                chunk.append("→   " if character == b"\t" else escaped(character), _MARK)
        yield chunk


def _whole_characters(text: bytes, limit: int) -> int:
    """Returns how many bytes the whole characters take that end within the first `limit`."""
    num_bytes = 0
    for character in characters(text[: limit + 3]):  # the longest character has four bytes
        if num_bytes + len(character) > limit:
            break
        num_bytes += len(character)
    return num_bytes
