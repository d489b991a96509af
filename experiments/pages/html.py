"""Renders the templates of this folder into pages that stand alone.

Every value that a template shows is escaped, unless it is Markup that a template or `svg` has made. A page has no
script, no font, no further file, and a content security policy lets a browser load nothing.
"""
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from experiments.pages.svg import NARROW, WIDE, histogram

_DIRECTORY = Path(__file__).parent
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_DIRECTORY), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


class Figure(NamedTuple):
    """A plot and the words below it."""
    plot: Markup
    caption: str


def render_page(template: str, **values: Any) -> str:
    """Returns the page of a template that extends page.html.jinja."""
    css = Markup((_DIRECTORY / "page.css").read_text(encoding="utf-8"))
    return _TEMPLATES.get_template(template).render(css=css, **values)


def render_part(template: str, macro: str, *values: Any) -> Markup:
    """Returns what one macro of a template makes of these values."""
    return getattr(_TEMPLATES.get_template(template).module, macro)(*values)


def length_figures(lengths: dict[str, np.ndarray], caption: Callable[[str, np.ndarray], str]) -> list[Figure]:
    """Draws a histogram of chunk lengths for every stage, side by side where there are several."""
    figures = []
    for name, each in lengths.items():
        plot, per_bar = histogram(
            each, y_label="% of chunks, by bytes per chunk", width=WIDE if len(lengths) == 1 else NARROW)
        width = f" A bar is {per_bar} bytes wide." if per_bar > 1 else ""
        figures.append(Figure(plot, caption(name, each) + width))
    return figures
