"""Text with its chunks coloured, as an HTML fragment: one panel per stage, one shown at a time.

Every byte of the text is in the fragment, exactly once per stage. Characters are shown as themselves; bytes
that have no glyph of their own (control characters, invalid UTF-8, a character cut in two by a boundary) are
shown as \\x1b. Neighbouring chunks alternate between two backgrounds; a character is underlined the more
strongly the more probable a boundary before it, and shows that probability while the pointer is on it.
"""
import dataclasses
import html
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

import numpy as np


@dataclasses.dataclass(frozen=True)
class StageChunks:
    """One level of the hierarchy, aligned with the bytes of the text: entry i speaks of text[i]."""
    name: str
    boundary_prob: np.ndarray  # [num_bytes] in [0, 1]; NaN where this stage saw no token at that byte
    is_boundary: np.ndarray    # [num_bytes] bool; True starts a chunk at that byte


@dataclasses.dataclass(frozen=True)
class ChunkedText:
    title: str
    text: bytes
    stages: tuple[StageChunks, ...]  # outermost first; () for a model that does not chunk
    nats: np.ndarray | None = None   # [num_bytes] -log p of each byte after those before it; None = not known

    def __post_init__(self) -> None:
        arrays = {} if self.nats is None else {"nats": self.nats}
        for stage in self.stages:
            arrays |= {f"boundary_prob of {stage.name}": stage.boundary_prob,
                       f"is_boundary of {stage.name}": stage.is_boundary}
        for name, array in arrays.items():
            if array.shape != (len(self.text),):
                raise ValueError(f"{name} has shape {array.shape}; "
                                 f"the text {self.title!r} needs ({len(self.text)},), one entry per byte")


def render_chunked_text(chunked: ChunkedText) -> str:
    """Returns a fragment which needs `CHUNK_CSS` on its page, and nothing else."""
    if chunked.stages:
        views = "".join(
            _stage_panel(chunked.text, stage, is_shown=index == 0)
            for index, stage in enumerate(chunked.stages))
    else:
        views = f'<pre class="chunk-text">{visible_text(chunked.text)}</pre>'
    # A form of its own keeps the radio buttons of several texts on one page from being one group.
    return (f'<form class="chunked" autocomplete="off"><h3>{html.escape(chunked.title)}</h3>'
            f'<div class="chunk-views">{views}</div></form>')


def visible_text(text: bytes) -> str:
    """Returns any bytes as HTML to stand in a <pre>: escaped, with marks for what has no glyph."""
    return "".join(_glyph(character) for character in characters(text))


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
    """Whether this UTF-8 character, or stray byte, shows as itself and moves nothing around it."""
    if character == b" ":
        return True
    # Z: other blanks and line separators. C: controls, marks that turn the writing direction, unassigned
    # code points, and the lone surrogates which stand for bytes that are not UTF-8.
    return unicodedata.category(character.decode("utf-8", "surrogateescape"))[0] not in "ZC"


def _stage_panel(text: bytes, stage: StageChunks, *, is_shown: bool) -> str:
    lengths = chunk_lengths(stage)
    size = f"{lengths.mean():.2f} bytes per chunk" if len(lengths) else "no text"
    # Decoded chunk by chunk, a character with a boundary inside falls apart into its bytes by itself.
    chunks = "".join(
        f'<span class="chunk chunk{index % 2}">'
        f'{_cells(text[start:stop], stage.boundary_prob[start:stop])}</span>'
        for index, (start, stop) in enumerate(pairwise(chunk_edges(stage))))
    return (f'<label><input type="radio" name="stage"{" checked" if is_shown else ""}>'
            f'{html.escape(stage.name)} <small>{size}</small></label>'
            f'<pre class="chunk-text">{chunks}</pre>')


def _cells(chunk: bytes, boundary_prob: np.ndarray) -> str:
    cells, position = [], 0
    for character in characters(chunk):
        prob = boundary_prob[position:position + len(character)]
        prob = prob[~np.isnan(prob)]
        cells.append(_glyph(character, _probability_attributes(prob)))
        position += len(character)
    return "".join(cells)


def _probability_attributes(prob: np.ndarray) -> str:
    """Returns the attributes of a character whose bytes have these probabilities; "" if none has one."""
    if not len(prob):
        return ""
    tip = " ".join(f"{p:.2f}" for p in prob)  # one number per byte of the character
    return f' data-p="{tip}" style="--p:{prob.max():.2f}"'


def _glyph(character: bytes, attributes: str = "") -> str:
    if character == b"\n":
        # The mark comes from the style sheet and the line break stays outside: copied text is the text.
        return f'<i class="newline"{attributes}></i>\n'
    if character == b"\t":
        return f'<i class="tab"{attributes}></i>\t'
    if not has_glyph(character):
        escape = "".join(f"\\x{byte:02x}" for byte in character)
        return f'<i class="hex"{attributes}>{escape}</i>'
    glyph = html.escape(character.decode())
    return f"<i{attributes}>{glyph}</i>" if attributes else glyph


CHUNK_CSS = """
.chunk-text { --chunk0: #dfeaf5; --chunk1: #f6ecd5; --edge: #b4541a; --mark: #858d95;
  --tip: #1d2126; --tip-ink: #fff; --frame: #e3e6e9; }
@media (prefers-color-scheme: dark) {
  .chunk-text { --chunk0: #20364b; --chunk1: #463a22; --edge: #f0a35e; --mark: #848d96;
    --tip: #f1f3f5; --tip-ink: #15181b; --frame: #2c3238; } }
.chunked { margin: 0 0 2.5rem; }
.chunked h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.chunk-views { display: flex; flex-wrap: wrap; gap: .4rem 1.5rem; }
.chunk-views label { cursor: pointer; }
.chunk-views input { margin: 0 .4em 0 0; accent-color: currentColor; }
.chunk-views label:only-of-type input { display: none; }
/* Each label is followed by its panel; `order` moves the panels below the row of labels. */
.chunk-views pre { order: 1; flex: 1 0 100%; min-width: 0; box-sizing: border-box; }
.chunk-views label:has(input:not(:checked)) + pre { display: none; }
.chunk-text { margin: 0; padding: .9rem 1rem; border: 1px solid var(--frame); border-radius: 6px;
  font: .84rem/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; tab-size: 4;
  white-space: break-spaces; overflow-wrap: anywhere; }
.chunk-text i { font-style: normal; position: relative; }
.chunk-text .hex { color: var(--mark); font-size: .85em; display: inline-block; }
.chunk-text .newline::before { content: "\\21b5"; color: var(--mark); }
.chunk-text .tab::before { content: "\\2192"; color: var(--mark); }
.chunk { padding: .18em 0; }
.chunk0 { background: var(--chunk0); }
.chunk1 { background: var(--chunk1); }
.chunk i[data-p] {
  box-shadow: inset 0 -2px color-mix(in srgb, var(--edge) calc(var(--p) * 80%), transparent); }
.chunk i[data-p]:hover { background: color-mix(in srgb, var(--edge) 40%, transparent); }
.chunk i[data-p]:hover::after { content: "p " attr(data-p); position: absolute; z-index: 1;
  left: 50%; bottom: 130%; transform: translateX(-50%); padding: 0 .5em; border-radius: 4px;
  background: var(--tip); color: var(--tip-ink); font-size: .78rem; white-space: nowrap;
  pointer-events: none; }
@media (max-width: 600px) {
  .chunk-text { padding: .6rem .7rem; font-size: .78rem; }
  .chunk i[data-p]:hover::after { position: fixed; bottom: .8rem; font-size: .95rem; } }
"""
