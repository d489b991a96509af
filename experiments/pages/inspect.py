"""One HTML page on a text read by a model: its chunks, their statistics, and the effects of small changes."""
import math
from typing import NamedTuple

import numpy as np

from experiments.analysis.chunk_statistics import bits_per_byte, number
from experiments.analysis.chunked_text import ChunkedText, Table, chunk_lengths
from experiments.pages.chunk_html import render_chunked_text
from experiments.pages.html import length_figures, render_page

NO_STAGES = "This model has no stages that chunk: it reads every {unit} at full depth."
PLACES_LEGEND = (
    "Precision: the share of boundaries that are at such a place. Base rate: the share of bytes that are. "
    "Lift: precision over base rate. Recall: the share of such places that are boundaries.")


class Inspection(NamedTuple):
    """The contents of the page and of the terminal."""
    name: str                     # of the run
    step: int                     # of the checkpoint
    chunked: ChunkedText
    stages: Table
    places: tuple[Table, ...]     # one per stage
    effects: Table
    num_perturbed: int            # bytes of the text that was changed, from its beginning

    @property
    def no_stages(self) -> str:
        """A note for models that do not chunk."""
        return NO_STAGES.format(unit="byte" if self.chunked.token_starts is None else "token")


def render_inspection(inspection: Inspection) -> str:
    """Returns the whole page."""
    chunked = inspection.chunked
    lengths = {stage.name: chunk_lengths(stage) for stage in chunked.stages}
    return render_page(
        "inspect.html.jinja",
        name=inspection.name,
        step=f"{inspection.step:,}",
        bits=number(bits_per_byte(chunked), 3),
        facts=[("bytes", f"{len(chunked.text):,}"), *_token_facts(chunked),
               *((f"bytes per chunk, {name}", number(each.mean())) for name, each in lengths.items())],
        num_stages=len(chunked.stages),
        has_tokens=chunked.token_starts is not None,
        no_stages=inspection.no_stages,
        text=render_chunked_text(chunked),
        stages=inspection.stages,
        lengths=length_figures(lengths, lambda name, _: f"{name}."),
        places=inspection.places,
        places_legend=PLACES_LEGEND,
        effects=inspection.effects,
        effects_legend=effects_legend(inspection),
    )


def _token_facts(chunked: ChunkedText) -> list[tuple[str, str]]:
    if chunked.token_starts is None:
        return []
    nats = chunked.token_nats()
    known = nats[~np.isnan(nats)]
    return [("tokens", f"{len(nats):,}"), ("nats per token", number(known.mean() if len(known) else math.nan))]


def effects_legend(inspection: Inspection) -> str:
    """Explains the table of changes; for the terminal and the page."""
    legend = "Each row is the text changed in one way, and read anew."
    if inspection.chunked.stages:
        legend += (" Rate: boundaries per byte or chunk that the stage saw. F1: agreement of the boundaries with"
                   " those of the text unchanged, where every byte kept its position; by chance it would be about"
                   " the share of bytes that are boundaries.")
    if inspection.num_perturbed < len(inspection.chunked.text):
        legend += f" Done on the first {inspection.num_perturbed:,} bytes of the text."
    return legend
