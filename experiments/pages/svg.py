"""Small plots as SVG, for pages: lines over training steps, and histograms of lengths.

Written by hand rather than with a plotting library, because the page asks for little and for one thing a
library does not give: ink that comes from the page's style sheet, so that one SVG serves light pages, dark
pages and phones. Pictures that are files of their own are drawn by `pictures`.
"""
import dataclasses
import enum
import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from experiments.pages.tables import format_number, unit_of

WIDE, NARROW = 760, 370  # in CSS pixels, which are the units of everything below
_TOP, _BOTTOM, _LEFT = 36, 30, 44
_LABEL_GAP = 20          # between the baselines of two labels at the ends of lines: a line of text on a phone
_MAX_POINTS = 800        # per line: more than there are pixels
_MAX_BARS = 24


class Ink(enum.StrEnum):
    """Classes of page.css in which a series is drawn."""
    FAINT = "faint"
    LINE = "line"
    OTHER = "line other"
    DOTS = "dots"


@dataclasses.dataclass(frozen=True)
class Series:
    """Values over training steps."""
    label: str     # written at the end of the line, before its last value; "" for none
    x: np.ndarray  # [num_points], rising
    y: np.ndarray  # [num_points], finite
    ink: Ink


def line_plot(
    series: Sequence[Series],
    *,
    y_label: str,
    references: dict[str, float] | None = None,
    from_zero: bool = False,
) -> Markup:
    """Returns an <svg> of the series over training steps, with a dashed line at each reference value.

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
        y_range=_y_range(np.concatenate([s.y for s in series] + [list(references.values())]), from_zero))

    drawn = [_element("path", class_="reference", d=f"M{_LEFT} {frame.y(value):.1f}H{frame.x_end}")
             for value in references.values()]
    drawn += [_dots(s, frame) if s.ink == Ink.DOTS else _path(s, frame) for s in series]
    end_values = [*references.values(), *(s.y[-1] for s in series)]
    kinds = ["quiet"] * len(references) + [s.ink for s in series]
    labels = [(frame.y(value), text, kind)
              for value, text, kind in zip(end_values, end_texts, kinds, strict=True) if text]
    heights = kept_apart([y for y, *_ in labels], gap=_LABEL_GAP, low=_TOP, high=frame.y_end)
    drawn += [frame.text(frame.x_end + 8, y + 4, text, kind)
              for y, (_, text, kind) in zip(heights, labels, strict=True)]
    return frame.svg([*frame.y_axis(y_label), *frame.x_axis("step"), *drawn], f"{y_label} over training steps")


def histogram(lengths: np.ndarray, *, y_label: str, width: int) -> tuple[Markup, int]:
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
        drawn.append(_element(
            "rect", _element("title", f"from {label}: {percent[index]:.1f} %"), x=f"{left:.1f}", y=f"{top:.1f}",
            width=f"{right - left:.1f}", height=f"{frame.y_end - top:.1f}"))
        if is_tail or (index % label_every == 0 and index + label_every < num_bars):
            drawn.append(frame.text((left + right) / 2, frame.height - 10, label, "middle"))
    return frame.svg([*frame.y_axis(y_label), *drawn], y_label), per_bar


def kept_apart(heights: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Moves heights, which grow downwards, to be `gap` apart: down at first, then up again those past `high`."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved, previous, following = list(heights), low - gap, high + gap
    for index in order:
        previous = moved[index] = max(moved[index], previous + gap)
    for index in reversed(order):
        following = moved[index] = min(moved[index], following - gap)
    return moved


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

    def y_axis(self, label: str) -> list[Markup]:
        parts = [self.text(0, 13, label, "quiet")]
        for tick, text in _ticks(*self.y_range):
            y = self.y(tick)
            parts.append(_element("path", class_="grid", d=f"M{_LEFT} {y:.1f}H{self.x_end}"))
            parts.append(self.text(_LEFT - 8, y + 4, text, "before"))
        return parts

    def x_axis(self, label: str) -> list[Markup]:
        y = self.height - 8
        ticks = [self.text(self.x(tick), y, text, "middle") for tick, text in _ticks(*self.x_range)]
        return [*ticks, self.text(self.x_end + 30, y, label, "quiet")]

    def text(self, x: float, y: float, text: str, kind: str) -> Markup:
        return _element("text", text, class_=kind, x=f"{x:.1f}", y=f"{y:.1f}")

    def svg(self, content: Sequence[Markup], description: str) -> Markup:
        size = "wide" if self.width == WIDE else "narrow"
        return _element("svg", Markup("").join(content), class_=f"plot {size}",
                        viewBox=f"0 0 {self.width} {self.height}", role="img", aria_label=description)


def _element(tag: str, content: str = "", **attributes: str) -> Markup:
    """Returns an element; content that is no Markup and the values of attributes are escaped."""
    named = Markup("").join(Markup(' {}="{}"').format(name.strip("_").replace("_", "-"), value)
                            for name, value in attributes.items())
    return Markup("<{0}{1}>{2}</{0}>").format(tag, named, content)


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
    size, unit = unit_of(max(abs(low), abs(high)))
    ticks = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    return [(tick, f"{tick / size:.4g}{unit}" if tick else "0") for tick in ticks]


def _path(series: Series, frame: _Frame) -> Markup:
    every = math.ceil(len(series.x) / _MAX_POINTS)
    kept = sorted({*range(0, len(series.x), every), len(series.x) - 1})
    points = "L".join(f"{frame.x(series.x[i]):.1f} {frame.y(series.y[i]):.1f}" for i in kept)
    return _element("path", class_=series.ink, d=f"M{points}h0")  # h0: a single point becomes a dot


def _dots(series: Series, frame: _Frame) -> Markup:
    return Markup("").join(
        _element("circle", _element("title", f"step {x:.0f}: {y:.3f}"), class_=Ink.DOTS, cx=f"{frame.x(x):.1f}",
                 cy=f"{frame.y(y):.1f}", r="4")
        for x, y in zip(series.x, series.y, strict=True))
