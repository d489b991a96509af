"""A picture shows every number where its axes say, on any page, and is the same file each time."""
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.colors import to_hex

from experiments.pages.pictures import Cells, Line, Lines, Row, Rows, draw, picture

SVG = "{http://www.w3.org/2000/svg}"
X = np.array([10, 20])
LINES = Lines("bits <&> $bytes$", [
    Line("a", 0, X, np.array([3.0, 2.0]), band=(np.array([2.5, 1.5]), np.array([4.0, 2.5]))),
    Line("b", 1, X, np.array([2.5, 2.01])), Line("empty", 2, X[:0], X[:0]),
    Line("far", 7, X, np.array([1.0, 2.02]))])
ROWS = Rows("after the last", [Row("a 2.1", 0, np.array([2.0, 2.2])), Row("b 3", 1, np.array([3.0]))])


def test_a_picture_is_a_file_without_a_background_that_loads_nothing():
    text = picture([LINES, ROWS])
    root = ET.fromstring(text)
    assert {"bits <&> $bytes$", "after the last", "a 2.00", "b 2.01", "far 2.02", "a 2.1", "b 3", "step"} <= {
        each.text for each in root.iter(f"{SVG}text")}
    assert not re.search(r"empty|<image|<script|@import|fill: #fff", text)
    assert all(reference.startswith("#") for reference in re.findall(r"(?:href=\"|url\()([^\")]*)", text))
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_the_same_data_are_the_same_file():
    assert picture([LINES, ROWS]) == picture([LINES, ROWS])


def test_lines_and_bands_hold_the_values_and_mixers_past_the_sixth_are_dashed():
    [axes] = draw([LINES]).axes
    drawn = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
    assert drawn == [([10, 20], [3.0, 2.0]), ([10, 20], [2.5, 2.01]), ([10, 20], [1.0, 2.02])]
    assert [line.get_linestyle() != "-" for line in axes.lines] == [False, False, True]
    assert to_hex(axes.lines[1].get_color()) == to_hex(axes.lines[2].get_color())
    [band] = axes.collections
    bounds = band.get_paths()[0].get_extents()
    assert (bounds.y0, bounds.y1) == (1.5, 4.0)
    low, high = axes.get_ylim()
    assert low < 1.0 and high > 4.0 and axes.get_xlim() == (0, 20)


def test_a_panel_may_begin_at_zero_and_a_single_point_is_a_dot():
    [axes] = draw([Lines("", [Line("a", 0, np.array([5]), np.array([80.0]))], from_zero=True)]).axes
    assert axes.get_ylim()[0] == 0 < 80 < axes.get_ylim()[1]
    assert axes.lines[0].get_marker() == "o"


def test_the_bar_of_a_row_is_at_the_mean_of_its_dots_and_rows_share_an_axis():
    [axes] = draw([ROWS]).axes
    bars, dots = axes.lines[::2], axes.lines[1::2]
    assert [bar.get_xdata()[0] for bar in bars] == pytest.approx([2.1, 3.0])
    assert [list(each.get_xdata()) for each in dots] == [[2.0, 2.2], [3.0]]
    assert [each.get_ydata()[0] for each in dots] == [0.5, 1.5]
    assert axes.get_ylim() == (2, 0)


def test_labels_stand_at_the_ends_of_their_lines_and_are_kept_apart():
    figure = draw([LINES])
    [axes] = figure.axes
    labels = [each for each in axes.texts if each.get_text() != "step"]
    heights = dict(sorted((each.xy[1] * axes.bbox.height * 96 / figure.dpi, each.get_text()) for each in labels))
    assert list(heights.values()) == ["a 2.00", "b 2.01", "far 2.02"]
    assert min(np.diff(list(heights))) >= 17.9
    for label, line in zip(labels, axes.lines, strict=True):
        assert to_hex(label.get_color()) == to_hex(line.get_color())


def test_panels_lie_below_each_other_inside_the_picture():
    upper, lower = (axes.get_position() for axes in draw([LINES, ROWS]).axes)
    assert upper.y1 <= 1 and lower.y1 < upper.y0 and lower.y0 >= 0
    assert 0 <= upper.x0 == lower.x0 and upper.x1 < 1


def test_cells_are_coloured_by_their_values_and_hold_their_texts():
    values = np.array([[1.0, 0.0], [np.nan, 0.5]])
    cells = Cells("needle", ["0.1", "0.9"], ["512", "1,024"], values, [["100 %", "0 %"], ["", "50 %"]], "tokens")
    figure = draw([cells, LINES])
    axes = figure.axes[0]
    placed = {(round(patch.get_x()), round(patch.get_y())): to_hex(patch.get_facecolor())
              for patch in axes.patches}
    assert placed.keys() == {(0, 0), (1, 0), (1, 1)}, "a cell of NaN is left out"
    assert len(set(placed.values())) == 3
    texts = {each.get_text(): each.get_position() for each in axes.texts if "%" in each.get_text()}
    assert texts == {"100 %": (0.5, 0.5), "0 %": (1.5, 0.5), "50 %": (1.5, 1.5)}
    assert [each.get_text() for each in axes.get_yticklabels()] == ["0.1", "0.9"] and axes.get_ylim() == (2, 0)
    assert "<image" not in picture([cells])
