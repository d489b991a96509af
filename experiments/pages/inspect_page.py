"""One HTML page on what a model makes of one text: its chunks, their statistics, what small changes do to them.

Like the report, the page stands alone, and a content security policy lets a browser load nothing.
"""
import html
from typing import NamedTuple

from experiments.analysis.chunk_statistics import Table, bits_per_byte, number
from experiments.pages.chunk_html import ChunkedText, chunk_lengths, render_chunked_text
from experiments.pages.report_page import figure, html_page, note
from experiments.pages.svg import NARROW, WIDE, histogram

NO_STAGES = "This model has no stages that chunk: it reads every byte at full depth."
PLACES_LEGEND = (
    "Precision: the share of boundaries that are at such a place. Base rate: the share of bytes that are. "
    "Lift: precision over base rate. Recall: the share of such places that are boundaries.")


class Inspection(NamedTuple):
    """What the page and the terminal show."""
    name: str                     # of the run
    step: int                     # of the checkpoint
    chunked: ChunkedText
    stages: Table
    places: tuple[Table, ...]     # one per stage
    effects: Table
    num_perturbed: int            # bytes of the text that was changed, from its beginning


def render_inspection(inspection: Inspection) -> str:
    """Returns the whole page."""
    sections = (
        ("Chunks", _chunks(inspection)),
        ("Chunk lengths", _lengths(inspection.chunked)),
        ("What stands at boundaries", _places(inspection)),
        ("The text, changed", _effects(inspection)),
    )
    return html_page(
        f"{inspection.name}: inside the model", _headline(inspection), sections, css=TABLE_CSS)


def effects_legend(inspection: Inspection) -> str:
    """Says what the table of changes holds; for the terminal and the page."""
    legend = "Each row is the text changed in one way, and read anew."
    if inspection.chunked.stages:
        legend += (" Rate: boundaries per byte or chunk that the stage saw. F1: agreement of the boundaries with"
                   " those of the text unchanged, where every byte kept its position; by chance it would be about"
                   " the share of bytes that are boundaries.")
    if inspection.num_perturbed < len(inspection.chunked.text):
        legend += f" Done on the first {inspection.num_perturbed:,} bytes of the text."
    return legend


def _headline(inspection: Inspection) -> str:
    chunked = inspection.chunked
    facts = [("bytes", f"{len(chunked.text):,}")]
    facts += [(f"bytes per chunk, {stage.name}", number(chunk_lengths(stage).mean())) for stage in chunked.stages]
    facts_html = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return (
        f'<header><p class="eyebrow">Inside the model, at step {inspection.step:,}</p>'
        f"<h1>{html.escape(inspection.name)}</h1>"
        f'<p class="score"><b>{number(bits_per_byte(chunked), 3)}</b> <span>bits per byte on this text</span></p>'
        f'<dl class="facts">{facts_html}</dl></header>')


def _chunks(inspection: Inspection) -> str:
    if not inspection.chunked.stages:
        return note(NO_STAGES) + render_chunked_text(inspection.chunked)
    legend = ("Each change of colour is a boundary the model chose. The underline shows how probable a "
              "boundary was before a character; point at one, or touch it, for the number.")
    if len(inspection.chunked.stages) > 1:
        legend += " An inner stage sees, and underlines, only the starts of the chunks outside it."
    return note(legend) + render_chunked_text(inspection.chunked) + _table(inspection.stages)


def _lengths(chunked: ChunkedText) -> str:
    width = WIDE if len(chunked.stages) == 1 else NARROW
    figures = ""
    for stage in chunked.stages:
        plot, per_bar = histogram(chunk_lengths(stage), y_label="% of chunks, by bytes per chunk", width=width)
        caption = stage.name + (f"; a bar is {per_bar} bytes wide" if per_bar > 1 else "")
        figures += figure(plot, caption)
    return figures and f'<div class="figures">{figures}</div>'


def _places(inspection: Inspection) -> str:
    if not inspection.places:
        return ""
    return note(PLACES_LEGEND) + "".join(map(_table, inspection.places))


def _effects(inspection: Inspection) -> str:
    return note(effects_legend(inspection)) + _table(inspection.effects)


def _table(table: Table) -> str:
    header = "".join(f"<th>{html.escape(title)}</th>" for title in table.header)
    rows = "".join(
        f"<tr><th>{html.escape(first)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in others)}</tr>"
        for first, *others in table.rows)
    # A wide table scrolls by itself; the page does not.
    return f'<div class="table"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'


TABLE_CSS = """
.table { overflow-x: auto; margin: 0 0 2rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; text-align: right; border-bottom: 1px solid var(--frame); white-space: nowrap; }
th { font-weight: 400; color: var(--soft); }
thead th { white-space: pre; vertical-align: bottom; color: var(--faint); line-height: 1.3; }
th:first-child { text-align: left; padding-left: 0; }
td:last-child, th:last-child { padding-right: 0; }
"""
