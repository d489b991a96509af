"""Pictures as .svg files, drawn by matplotlib: panels of lines, of dots and of cells, one below the other.

A picture has no background and one set of colours, which read on light and on dark pages alike: a page that shows
the file as an image has a scheme of its own, which the file cannot be sure to hear of. The same data give the same
file, byte by byte.
"""
import dataclasses
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.pages.svg import kept_apart
from experiments.pages.tables import format_number

# In CSS pixels, 96 an inch, as everything below.
_WIDTH, _LEFT, _TITLE, _AXIS, _GAP = 788, 58, 46, 34, 16
_LINES, _ROW = 250, 30      # heights, of a panel of lines and of one row of dots
_LABEL_GAP = 18             # between two labels at the ends of lines
# Each is more than 4 to 1 against white and against near-black; past the sixth, lines are dashed.
_COLOURS = ("#2f7dd1", "#c4620a", "#2b8a3e", "#9a5bd6", "#d6457f", "#1a8a92")
_QUIET, _GRID = "#6e7a85", "#88929c44"
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "hnet-jax", "font.size": 9.4, "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Segoe UI", "Roboto", "Helvetica Neue", "Arial"], "text.color": _QUIET,
    "text.parse_math": False, "xtick.color": _QUIET, "ytick.color": _QUIET, "axes.unicode_minus": False,
    "path.simplify": False}


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve, with its label and last value at its end."""
    label: str
    ink: int       # number of its colour, from 0
    x: np.ndarray  # [num_points], rising
    y: np.ndarray  # [num_points], finite
    band: tuple[np.ndarray, np.ndarray] | None = None  # lower and upper edge around y, [num_points] each


@dataclasses.dataclass(frozen=True)
class Lines:
    """A panel of curves, at least one of which has a point."""
    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    from_zero: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """A dot per value and a bar at their mean, with a label at the end."""
    label: str
    ink: int
    values: np.ndarray  # [num_values], finite, at least one


@dataclasses.dataclass(frozen=True)
class Rows:
    """A panel of rows that share an axis."""
    title: str
    rows: Sequence[Row]


@dataclasses.dataclass(frozen=True)
class Cells:
    """A panel of cells with a text each, coloured by a value: a heat map."""
    title: str
    rows: Sequence[str]              # names, from the top
    columns: Sequence[str]
    values: np.ndarray               # [rows, columns] from 0 to 1; NaN = no cell
    texts: Sequence[Sequence[str]]   # [rows][columns]
    x_label: str = ""


Panel = Lines | Rows | Cells


def picture(panels: Sequence[Panel]) -> str:
    """Returns the text of an .svg file with these panels."""
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        unnamed = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        draw(panels).savefig(file, format="svg", transparent=True, metadata=unnamed)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def draw(panels: Sequence[Panel]) -> Figure:
    """Returns the figure, with one pair of axes for each panel."""
    heights = [_LINES if isinstance(panel, Lines) else _ROW * len(panel.rows) for panel in panels]
    draw_panel = {Lines: _draw_lines, Rows: _draw_rows, Cells: _draw_cells}
    total = sum(heights) + len(panels) * (_TITLE + _AXIS + _GAP)
    figure, top = Figure(figsize=(_WIDTH / 96, total / 96)), 0
    for panel, height in zip(panels, heights, strict=True):
        labels = _labels(panel)
        width = _WIDTH - _LEFT - max(76, 24 + 8 * max(map(len, labels)))
        bottom = total - top - _TITLE - height
        axes = figure.add_axes((_LEFT / _WIDTH, bottom / total, width / _WIDTH, height / total))
        figure.text(14 / _WIDTH, (total - top - 27) / total, panel.title)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, pad=8)
        if not isinstance(panel, Cells):
            axes.locator_params(nbins=6)
        draw_panel[type(panel)](axes, panel, labels, height)
        top += _TITLE + height + _AXIS + _GAP
    return figure


def _labels(panel: Panel) -> list[str]:
    if isinstance(panel, Cells):
        return [panel.x_label]
    if isinstance(panel, Rows):
        return [row.label for row in panel.rows]
    return [f"{line.label} {format_number(line.y[-1])}" for line in panel.lines if len(line.x)]


def _draw_lines(axes: Axes, panel: Lines, labels: Sequence[str], height: int) -> None:
    lines = [line for line in panel.lines if len(line.x)]
    for line in lines:
        if line.band is not None:
            axes.fill_between(line.x, *line.band, color=_colour(line.ink), alpha=0.22, linewidth=0)
        style = (0, (4, 2.5)) if line.ink >= len(_COLOURS) else "-"
        axes.plot(line.x, line.y, color=_colour(line.ink), linestyle=style, linewidth=1.7, solid_capstyle="round",
                  marker="o" if len(line.x) == 1 else None, markersize=3, clip_on=False)
    axes.margins(x=0, y=0.05)
    axes.set_xlim(0, max(max(line.x[-1] for line in lines), 1e-9))
    if panel.from_zero:
        axes.set_ylim(0, axes.get_ylim()[1] or 1)
    axes.grid(axis="y", color=_GRID, linewidth=0.75)
    low, high = axes.get_ylim()
    ends = [height * (high - line.y[-1]) / (high - low) for line in lines]
    for line, label, end in zip(lines, labels, kept_apart(ends, gap=_LABEL_GAP, low=0, high=height), strict=True):
        _label(axes, 1 - end / height, label, line.ink)
    if panel.x_label:
        axes.annotate(panel.x_label, (1, 0), (22, -8), "axes fraction", "offset points", va="top")


def _draw_rows(axes: Axes, panel: Rows, labels: Sequence[str], height: int) -> None:
    for index, (row, label) in enumerate(zip(panel.rows, labels, strict=True)):
        colour, y = _colour(row.ink), index + 0.5
        axes.plot([np.mean(row.values)] * 2, [y - 0.33, y + 0.33], color=colour, linewidth=1.7)
        axes.plot(row.values, [y] * len(row.values), "o", color=colour, alpha=0.75, markersize=6.5,
                  markeredgewidth=0)
        _label(axes, 1 - y / len(panel.rows), label, row.ink)
    axes.set_ylim(len(panel.rows), 0)
    axes.set_yticks([])
    axes.margins(x=0.05)
    axes.grid(axis="x", color=_GRID, linewidth=0.75)


def _draw_cells(axes: Axes, panel: Cells, labels: Sequence[str], height: int) -> None:
    low, high = (np.array(to_rgb(_COLOURS[ink])) for ink in (1, 0))
    for row, column in np.argwhere(np.isfinite(panel.values)):
        value = panel.values[row, column]
        axes.add_patch(Rectangle((column + 0.02, row + 0.03), 0.96, 0.94, color=low + value * (high - low)))
        axes.text(column + 0.5, row + 0.5, panel.texts[row][column], color="white", ha="center", va="center")
    axes.set_xlim(0, len(panel.columns))
    axes.set_ylim(len(panel.rows), 0)
    axes.set_xticks(np.arange(len(panel.columns)) + 0.5, panel.columns)
    axes.set_yticks(np.arange(len(panel.rows)) + 0.5, panel.rows)
    axes.annotate(panel.x_label, (1, 0), (22, -8), "axes fraction", "offset points", va="top")


def _label(axes: Axes, y: float, text: str, ink: int) -> None:
    axes.annotate(text, (1, y), (7, 0), "axes fraction", "offset points", va="center", color=_colour(ink),
                  weight="bold")


def _colour(ink: int) -> str:
    return _COLOURS[ink % len(_COLOURS)]
