"""The table, the picture and the page of a suite, drawn from its finished contexts alone."""
import math
import re
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from experiments.analysis.chunked_text import Table
from experiments.config.codec import flat_fields
from experiments.pages.html import Figure, render_page
from experiments.pages.pictures import Cells, Line, Lines, Panel, picture
from experiments.pages.tables import format_number, markdown_table
from experiments.runs.grid import origin
from experiments.tasks.longcontext.scores import RESAMPLES, Cost, Score, base_task, costs
from experiments.tasks.longcontext.suite import Result, Settings

DIGITS = ("needle", "multi_needle", "key_value")  # tests whose answers are digits
LEGEND = (
    "Exact: answers whose every token was the most probable one, of all. Nats: per digit of the answer, or per "
    f"token (copy, position). In brackets: 95 % intervals (Wilson's for shares, in per cent; {RESAMPLES} "
    "bootstrap resamples for means), which count answers as independent. Chance: a guess that knows the form of "
    "an answer.")
CAPTIONS = {
    Cells: "A row is a depth: 0 is the beginning of the context. Blue: all answers are exact; orange: none is.",
    Lines: "Bands are 95 % intervals of the means."}
COSTS_LEGEND = (
    "Reading: seconds for a context, without compilation, the median over contexts. Answering: for one question. "
    "State: everything kept of a context, empty slots included. Memory: the largest resident so far, by rising "
    "length.")


def render_table(results: Sequence[Result], scores: Sequence[Score]) -> str:
    """Returns the tables of a suite in Markdown, and under them the origin of the numbers."""
    tables = [score_table(scores), needle_table(scores), cost_table(costs(results))]
    shown = "\n\n".join(markdown_table(table.header, table.rows) for table in tables if table.rows)
    return f"{shown}\n\n{LEGEND} {COSTS_LEGEND} {origin(results)}\n"


def score_table(scores: Sequence[Score]) -> Table:
    """Returns one row per test and measure, one column per length."""
    whole = [score for score in scores if score.depth is None]
    lengths = sorted({score.length for score in whole})
    rows = []
    for task in dict.fromkeys(score.task for score in whole):
        by_length = {score.length: score for score in whole if score.task == task}
        some = next(iter(by_length.values()))
        if task in DIGITS:
            rows.append((f"{_title(task)}, exact", f"{100 * some.exact_chance:.3g} %",
                         *(_exact(by_length.get(length)) for length in lengths)))
        rows.append((f"{_title(task)}, nats", f"{some.nats_chance:.2f}",
                     *(_nats(by_length.get(length)) for length in lengths)))
    return Table(("test", "chance", *(f"{length:,}" for length in lengths)), tuple(rows))


def needle_table(scores: Sequence[Score]) -> Table:
    """Returns the share of exact answers and the nats per digit of the needle, by depth and length."""
    cells = {(score.depth, score.length): score for score in scores
             if score.task == "needle" and score.depth is not None}
    lengths = sorted({length for _, length in cells})
    rows = tuple(
        (f"{depth:g}", *(_cell(cells.get((depth, length))) for length in lengths))
        for depth in sorted({depth for depth, _ in cells}))
    return Table(("needle at depth: exact, nats", *(f"{length:,}" for length in lengths)), rows)


def cost_table(costs: Sequence[Cost]) -> Table:
    header = ("tokens", "contexts", "compiling, s", "reading, s", "answering, s", "state, MB", "memory, MB")
    return Table(header, tuple(
        (f"{cost.length:,}", str(cost.num_contexts), f"{cost.compile_seconds:.1f}", f"{cost.read_seconds:.2f}",
         f"{cost.answer_seconds:.2f}", f"{cost.state_bytes / 1e6:,.1f}", f"{cost.peak_bytes / 1e6:,.0f}")
        for cost in costs))


def render_plot(scores: Sequence[Score]) -> str:
    """Returns an .svg file: the needle by depth and length, and nats by length."""
    return picture([panel for _, panel in panels(scores)])


def panels(scores: Sequence[Score]) -> list[tuple[str, Panel]]:
    """Returns every panel with a heading; those of tests that were not asked are left out."""
    drawn: list[tuple[str, Panel]] = []
    cells = needle_cells(scores)
    if cells.values.size:
        drawn.append(("Needle by depth and length", cells))
    for heading, title, is_shown in (
            ("Nats per token by length", "nats per token of the answer", lambda task: task not in DIGITS),
            ("Nats per digit by length", "nats per digit of the answer; chance 2.3", lambda task: task in DIGITS)):
        lines = _lines([score for score in scores if score.depth is None and is_shown(score.task)])
        if lines:
            drawn.append((heading, Lines(title, lines, x_label="tokens", from_zero=True)))
    return drawn


def needle_cells(scores: Sequence[Score]) -> Cells:
    """Returns the heat map of the needle: colours are shares of exact answers, texts nats per digit."""
    cells = {(score.depth, score.length): score for score in scores
             if score.task == "needle" and score.depth is not None}
    lengths, depths = (sorted({key[axis] for key in cells}) for axis in (1, 0))
    at = [[cells.get((depth, length)) for length in lengths] for depth in depths]
    values = np.array([[score.exact if score else math.nan for score in row] for row in at]).reshape(
        len(depths), len(lengths))
    texts = [[_cell(score) for score in row] for row in at]
    return Cells("needle by depth: share of exact answers, which is the colour, and nats per digit", [
        f"{depth:g}" for depth in depths], [f"{length:,}" for length in lengths], values, texts, "tokens")


def render_suite_page(
    name: str, step: int, results: Sequence[Result], scores: Sequence[Score], settings: Settings
) -> str:
    """Returns the whole page."""
    headline, headline_of = _headline(scores)
    facts = [("longest", f"{max(result.length for result in results):,} tokens"),
             ("contexts", f"{len(results):,}"),
             ("questions", f"{sum(len(result.answers) for result in results):,}")]
    figures = [(heading, Figure(_inline(picture([panel])), CAPTIONS[type(panel)]))
               for heading, panel in panels(scores)]
    shown = Table(("setting", "value"), tuple(
        (name, str(value)) for name, value in flat_fields(settings).items() if not name.startswith("model.")))
    return render_page(
        "longcontext.html.jinja", name=name, step=f"{step:,}", score=headline, score_of=headline_of, facts=facts,
        scores=score_table(scores), scores_legend=LEGEND, figures=figures, costs=cost_table(costs(results)),
        costs_legend=COSTS_LEGEND, origin=shown, origin_note=origin(results))


def _headline(scores: Sequence[Score]) -> tuple[str, str]:
    whole = [score for score in scores if score.depth is None]
    needles = [score for score in whole if score.task == "needle"]
    if needles:
        num_exact = sum(round(score.exact * score.num_answers) for score in needles)
        return f"{num_exact}/{sum(score.num_answers for score in needles)}", "needles found, every digit right"
    last = whole[-1]
    return format_number(last.nats), f"nats, {_title(last.task)} at {last.length:,} tokens"


def _lines(scores: Sequence[Score]) -> list[Line]:
    lines = []
    for ink, task in enumerate(dict.fromkeys(score.task for score in scores)):
        each = sorted((score for score in scores if score.task == task), key=lambda score: score.length)
        x, y = np.array([score.length for score in each]), np.array([score.nats for score in each])
        bounds = np.array([score.nats_interval or (score.nats, score.nats) for score in each])
        lines.append(Line(_title(task), ink, x, y, band=(bounds[:, 0], bounds[:, 1])))
    return lines


def _title(task: str) -> str:
    return task.replace(base_task(task), base_task(task).replace("_", "-"))


def _exact(score: Score | None) -> str:
    if score is None:
        return ""
    low, high = (100 * end for end in score.exact_interval)
    return f"{round(score.exact * score.num_answers)}/{score.num_answers} [{low:.0f}, {high:.0f}]"


def _nats(score: Score | None) -> str:
    if score is None:
        return ""
    interval = "" if score.nats_interval is None else " [{:.2f}, {:.2f}]".format(*score.nats_interval)
    return f"{score.nats:.3f}{interval}"


def _cell(score: Score | None) -> str:
    return "" if score is None else f"{100 * score.exact:.0f} %, {score.nats:.2f}"


def _inline(svg: str) -> Markup:
    """Returns a picture as an element of a page, as wide as the page lets it be."""
    element = svg[svg.index("<svg") :]
    return Markup(re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1', element, count=1).replace(
        "<svg", '<svg class="picture"', 1))
