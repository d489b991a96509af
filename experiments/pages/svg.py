"""Small plots as SVG: lines over training steps, histograms of lengths, and values of several groups in rows.

Written by hand rather than with a plotting library, because the page asks for little and for one thing a
library does not give: ink that comes from the page's style sheet, so that one SVG serves light pages, dark
pages and phones. It also leaves a report nothing to install. `standalone` makes a file of its own of them.
"""
import dataclasses
import html
import math
import re
from collections.abc import Sequence

import numpy as np

WIDE, NARROW = 760, 370  # in CSS pixels, which are the units of everything below
_TOP, _BOTTOM, _LEFT = 36, 30, 44
_LABEL_GAP = 20          # between the baselines of two labels at the ends of lines: a line of text on a phone
_MAX_POINTS = 800        # per line: more than there are pixels
_MAX_BARS = 24
_MARGIN, _BETWEEN = 14, 26  # around the plots of a file, and between them
_ROW = 30                # height of a row of dots
# Each is more than 4 to 1 against white and against near-black.
_COLOURS = ("#2f7dd1", "#c4620a", "#2b8a3e", "#9a5bd6", "#d6457f", "#1a8a92")


@dataclasses.dataclass(frozen=True)
class Series:
    label: str     # written at the end of the line, before its last value; "" for none
    x: np.ndarray  # [num_points], rising
    y: np.ndarray  # [num_points], finite
    # How PLOT_CSS draws it: "faint", "line", "line other", "dots", "line " + colour(index), or that + " dashed".
    kind: str
    band: tuple[np.ndarray, np.ndarray] | None = None  # lower and upper edge around y, [num_points] each


@dataclasses.dataclass(frozen=True)
class Row:
    label: str           # written at the end of the row, after its values
    values: np.ndarray   # [num_values], finite, at least one
    titles: Sequence[str]  # [num_values], shown when pointing at a dot
    colour: str          # from colour(index)


def colour(index: int) -> str:
    """Names the colour of the series or row of this number, from 0; they come again after six."""
    return f"c{index % len(_COLOURS)}"


def line_plot(
    series: Sequence[Series],
    *,
    y_label: str,
    x_label: str = "step",
    references: dict[str, float] | None = None,
    from_zero: bool = False,
) -> str:
    """Returns an <svg> of the series over x, the training step, with a dashed line at each reference value.

    Raises:
      ValueError: no series has a point.
    """
    series, references = [s for s in series if len(s.x)], references or {}
    if not series:
        raise ValueError("line_plot needs a point; say in words that there is nothing to show yet")
    end_texts = [f"{name} {format_number(value)}" for name, value in references.items()]
    end_texts += [f"{s.label} {format_number(s.y[-1])}" if s.label else "" for s in series]
    frame = _Frame(
        width=WIDE, height=310, right=_label_margin(end_texts),
        x_range=(0, max(s.x[-1] for s in series) or 1),
        y_range=_y_range(np.concatenate(
            [s.y for s in series] + [edge for s in series for edge in s.band or ()] + [list(references.values())]),
            from_zero))

    drawn = [f'<path class="reference" d="M{_LEFT} {frame.y(value):.1f}H{frame.x_end}"/>'
             for value in references.values()]
    drawn += [_band(s, frame) for s in series if s.band]
    drawn += [_dots(s, frame) if s.kind == "dots" else _path(s, frame) for s in series]
    end_values = [*references.values(), *(s.y[-1] for s in series)]
    kinds = ["quiet"] * len(references) + [s.kind for s in series]
    labels = [(frame.y(value), text, kind)
              for value, text, kind in zip(end_values, end_texts, kinds, strict=True) if text]
    for y, text, kind in _spread(labels, low=_TOP, high=frame.y_end):
        drawn.append(frame.text(frame.x_end + 8, y + 4, text, kind))
    axes = frame.y_axis(y_label) + frame.x_axis(x_label)
    over = "training steps" if x_label == "step" else x_label
    return frame.svg(axes + "".join(drawn), f"{y_label} over {over}")


def row_plot(rows: Sequence[Row], *, x_label: str) -> str:
    """Returns an <svg> with a dot per value and a bar at the mean of each row."""
    frame = _Frame(
        width=WIDE, height=_TOP + _ROW * len(rows) + _BOTTOM, right=_label_margin([row.label for row in rows]),
        x_range=_padded(np.concatenate([row.values for row in rows])), y_range=(len(rows), 0))
    drawn = [frame.text(0, 13, x_label, "quiet")]
    for tick, text in _ticks(*frame.x_range):
        x = frame.x(tick)
        drawn.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{frame.y_end}"/>')
        drawn.append(frame.text(x, frame.height - 8, text, "middle"))
    for index, row in enumerate(rows):
        y, mean = frame.y(index + 0.5), frame.x(float(np.mean(row.values)))
        drawn.append(f'<path class="line {row.colour}" d="M{mean:.1f} {y - 10:.1f}v20"/>')
        drawn += [f'<circle class="{row.colour}" cx="{frame.x(value):.1f}" cy="{y:.1f}" r="4.5">'
                  f"<title>{html.escape(title)}</title></circle>"
                  for value, title in zip(row.values, row.titles, strict=True)]
        drawn.append(frame.text(frame.x_end + 8, y + 4, row.label, f"line {row.colour}"))
    return frame.svg("".join(drawn), x_label)


def standalone(plots: Sequence[str]) -> str:
    """Returns the text of an .svg file with these plots, all WIDE, one below the other.

    It has no background and one set of colours, which read on light and on dark pages alike: a page that shows
    the file as an image has a scheme of its own, which the file cannot be sure to hear of.
    """
    heights = [int(re.search(r'viewBox="0 0 \d+ (\d+)"', plot)[1]) for plot in plots]
    tops = [_MARGIN + sum(heights[:index]) + _BETWEEN * index for index in range(len(plots))]
    width, height = WIDE + 2 * _MARGIN, tops[-1] + heights[-1] + _MARGIN
    panels = "".join(
        plot.replace("<svg ", f'<svg x="{_MARGIN}" y="{top}" width="{WIDE}" height="{size}" ', 1) + "\n"
        for plot, top, size in zip(plots, tops, heights, strict=True))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}">\n<style>{INK_CSS}{_STANDALONE_CSS}</style>\n{panels}</svg>\n')


def histogram(lengths: np.ndarray, *, y_label: str, width: int) -> tuple[str, int]:
    """Returns an <svg> and how many lengths share a bar; the last bar gathers the longest, about 2 %.

    Args:
      lengths: [num_lengths] positive integers, at least one.
    """
    longest_shown = int(np.percentile(lengths, 98))
    per_bar = math.ceil(longest_shown / _MAX_BARS)
    num_bars = math.ceil(longest_shown / per_bar) + 1  # with the tail
    bar = np.minimum((lengths - 1) // per_bar, num_bars - 1)
    percent = 100 * np.bincount(bar, minlength=num_bars) / len(lengths)

    frame = _Frame(
        width=width, height=250, right=14, x_range=(0, num_bars), y_range=_y_range(percent, from_zero=True))
    drawn = []
    label_every = math.ceil(num_bars * 30 / (frame.x_end - _LEFT))  # 30: the width of a label and its gap
    for index in range(num_bars):
        left, right, top = frame.x(index) + 1, frame.x(index + 1) - 1, frame.y(percent[index])
        low, is_tail = 1 + index * per_bar, index == num_bars - 1
        label = f"{low}+" if is_tail else f"{low}"
        drawn.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{frame.y_end - top:.1f}">'
            f"<title>from {label}: {percent[index]:.1f} %</title></rect>")
        if is_tail or (index % label_every == 0 and index + label_every < num_bars):
            drawn.append(frame.text((left + right) / 2, frame.height - 10, label, "middle"))
    return frame.svg(frame.y_axis(y_label) + "".join(drawn), y_label), per_bar


def format_number(value: float) -> str:
    """Two decimals or three digits, with k, M and G from ten thousand on: 0.25, 2.30, 480, 16.5k, 1.20M."""
    size, unit = _unit(abs(value))
    value = value / size
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}{unit}"


def _unit(largest: float) -> tuple[float, str]:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 0.9995 * size and largest >= 10_000:
            return size, unit
    return 1, ""


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The rectangle inside the axes, and the maps from data to pixels."""
    width: int
    height: int
    right: int  # margin for the labels at the ends of the lines
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    @property
    def x_end(self) -> int:
        return self.width - self.right

    @property
    def y_end(self) -> int:
        return self.height - _BOTTOM

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (self.x_end - _LEFT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.y_end - (value - low) / (high - low) * (self.y_end - _TOP)

    def y_axis(self, label: str) -> str:
        parts = [self.text(0, 13, label, "quiet")]
        for tick, text in _ticks(*self.y_range):
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{self.x_end}"/>')
            parts.append(self.text(_LEFT - 8, y + 4, text, "before"))
        return "".join(parts)

    def x_axis(self, label: str) -> str:
        y = self.height - 8
        ticks = [self.text(self.x(tick), y, text, "middle") for tick, text in _ticks(*self.x_range)]
        return "".join(ticks) + self.text(self.x_end + 30, y, label, "quiet")

    def text(self, x: float, y: float, text: str, kind: str) -> str:
        return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'

    def svg(self, content: str, description: str) -> str:
        size = "wide" if self.width == WIDE else "narrow"
        return (f'<svg class="plot {size}" viewBox="0 0 {self.width} {self.height}" role="img" '
                f'aria-label="{html.escape(description)}">{content}</svg>')


def _y_range(y: np.ndarray, from_zero: bool) -> tuple[float, float]:
    if not from_zero:
        return _padded(y)
    high = float(y.max())
    return 0.0, high + (0.05 * high or 1.0)


def _padded(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 1.0  # a single level still gets an axis around it
    return low - margin, high + margin


def _label_margin(texts: Sequence[str]) -> int:
    return max(76, 16 + 9 * max(map(len, texts)))


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Returns round numbers inside [low, high] and how they are written: three to six of them."""
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough)
    size, unit = _unit(max(abs(low), abs(high)))
    ticks = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    return [(tick, f"{tick / size:.4g}{unit}" if tick else "0") for tick in ticks]


def _path(series: Series, frame: _Frame) -> str:
    every = math.ceil(len(series.x) / _MAX_POINTS)
    kept = sorted({*range(0, len(series.x), every), len(series.x) - 1})
    points = "L".join(f"{frame.x(series.x[i]):.1f} {frame.y(series.y[i]):.1f}" for i in kept)
    return f'<path class="{series.kind}" d="M{points}h0"/>'  # h0: a single point becomes a dot


def _band(series: Series, frame: _Frame) -> str:
    low, high = series.band
    edge = [*zip(series.x, high, strict=True), *reversed(list(zip(series.x, low, strict=True)))]
    points = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in edge)
    return f'<path class="{series.kind.replace("line", "band")}" d="M{points}Z"/>'


def _dots(series: Series, frame: _Frame) -> str:
    return "".join(
        f'<circle class="dots" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4">'
        f'<title>step {x:.0f}: {y:.3f}</title></circle>' for x, y in zip(series.x, series.y, strict=True))


def _spread(labels: list[tuple[float, str, str]], *, low: float, high: float) -> list[tuple[float, str, str]]:
    """Moves labels down to keep them apart, then up again those that left the plot at the bottom."""
    labels = sorted(labels)
    heights, previous = [], low - _LABEL_GAP
    for y, *_ in labels:
        previous = max(y, previous + _LABEL_GAP)
        heights.append(previous)
    following = high + _LABEL_GAP
    for index in reversed(range(len(heights))):
        following = heights[index] = min(heights[index], following - _LABEL_GAP)
    return [(y, text, kind) for y, (_, text, kind) in zip(heights, labels, strict=True)]


# What draws the marks; the variables are colours.
INK_CSS = """
.plot path { fill: none; stroke-linecap: round; stroke-linejoin: round; }
.plot path.grid { stroke: var(--grid); }
.plot path.reference { stroke: var(--quiet); stroke-dasharray: 5 5; }
.plot path.faint { stroke: var(--data); stroke-opacity: .4; }
.plot path.line { stroke: var(--data); stroke-width: 2.2; }
.plot path.other { stroke: var(--other); }
.plot path.dashed { stroke-dasharray: 6 5; }
.plot rect { fill: var(--data); }
.plot circle { fill: var(--other); }
.plot text { font-size: 12.5px; fill: var(--tick); }
.plot text.before { text-anchor: end; }
.plot text.middle { text-anchor: middle; }
.plot text.line { fill: var(--data); font-weight: 600; }
.plot text.dots, .plot text.other { fill: var(--other); font-weight: 600; }
.plot text.quiet { fill: var(--quiet); }
"""
PLOT_CSS = INK_CSS + """
.plot { --data: #24618e; --other: #b4541a; --grid: #e3e6e9; --tick: #4b535b; --quiet: #737b83;
  display: block; width: 100%; height: auto; overflow: visible; font-variant-numeric: tabular-nums; }
@media (prefers-color-scheme: dark) {
  .plot { --data: #79b4e3; --other: #f0a35e; --grid: #2c3238; --tick: #b3bac1; --quiet: #8b939b; } }
@media (max-width: 600px) { .plot.wide text { font-size: 17.5px; } }
"""
_STANDALONE_CSS = (
    ".plot { --tick: #6e7a85; --quiet: #6e7a85; --grid: #88929c44; font-variant-numeric: tabular-nums; "
    "font-family: system-ui, -apple-system, \"Segoe UI\", Roboto, Arial, sans-serif; }\n"
    ".plot path.band { fill: var(--data); fill-opacity: .22; }\n"
    ".plot circle { fill: var(--data); fill-opacity: .75; }\n"
    + "".join(f".plot .c{index} {{ --data: {value}; }}\n" for index, value in enumerate(_COLOURS)))
