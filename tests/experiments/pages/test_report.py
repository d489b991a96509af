"""The page must survive any bytes and any run, finished or not, and load nothing."""
import dataclasses
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from experiments.analysis.chunked_text import ChunkedText, StageChunks, chunk_lengths
from experiments.pages.chunk_html import render_chunked_text, visible_text
from experiments.pages.report import ReportData, render_report, verdict
from experiments.pages.svg import NARROW, Ink, Series, histogram, line_plot
from experiments.pages.tables import format_number

VOID_TAGS = {"meta", "input"}
EMOJI = "😀".encode()
HOSTILE = (b"\r\n<script>alert('1')</script>\t&amp; \"</pre>" + EMOJI + "é\u202e\u2028\ufeff".encode()
           + bytes(range(256)))


class Page(HTMLParser):
    """Checks that tags balance; collects attributes, chunks and the text of each <pre>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open_tags: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.bytes_of_pre: list[bytes] = []
        self.feed(page)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open_tags.append((tag, dict(attrs).get("class", "")))
        if tag == "pre":
            self.bytes_of_pre.append(b"")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        opened, _ = self.open_tags.pop()
        assert opened == tag

    def handle_data(self, text):
        if "pre" not in (tag for tag, _ in self.open_tags):
            return
        is_hex = self.open_tags[-1] == ("i", "hex")
        self.bytes_of_pre[-1] += bytes.fromhex(text.replace("\\x", "")) if is_hex else text.encode()

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def _stage(text: bytes, starts: set[int], name: str = "stage0") -> StageChunks:
    is_boundary = np.isin(np.arange(len(text)), sorted(starts))
    return StageChunks(name, np.where(is_boundary, 0.9, 0.1), is_boundary)


def _metrics(num_steps: int) -> list[dict]:
    lines = []
    for step in range(10, num_steps + 1, 10):
        lines.append({"step": step, "train/bits_per_byte": 2 + 6 / step, "stage0/boundary_rate": 0.25,
                      "stage1/boundary_rate": 0.5, "perf/bytes_per_second": 16_000.0 + step})
        if step % 50 == 0:
            lines.append({"step": step, "eval/bits_per_byte": 2.2 + 6 / step})
    return lines


def _data(**changes) -> ReportData:
    text = b"def chunk(x):\n    return x\n"
    outer = _stage(text, {0, 4, 10, 14, 18, 25})
    inner_prob = np.where(outer.is_boundary, 0.6, np.nan)
    inner = StageChunks("stage1", inner_prob, np.isin(np.arange(len(text)), [0, 14]))
    data = ReportData(
        name="a <run>", config={"num_steps": 100, "url": "https://example.org"},
        manifest={"num_params": 463_210, "train_seconds": 182.3, "device_kind": "cpu", "device_count": 2},
        metrics=_metrics(100), reference_lines={"unigram": 4.7, "bigram": 3.5, "zlib": 2.1},
        texts=(ChunkedText("code", text, (outer, inner)),
               ChunkedText("prose", HOSTILE, (_stage(HOSTILE, {0, 9}),))),
        samples=(("def ", HOSTILE),))
    return dataclasses.replace(data, **changes)


def test_every_byte_survives_in_every_stage_in_order():
    stages = (_stage(HOSTILE, {0, 3, 50, 51}), _stage(HOSTILE, {0, 50}, "stage1"))

    fragment = render_chunked_text(ChunkedText("hostile", HOSTILE, stages))

    assert Page(fragment).bytes_of_pre == [HOSTILE, HOSTILE]
    # A browser drops NUL, rewrites a carriage return and obeys marks that turn the writing direction.
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e\ufeff]", fragment)


@pytest.mark.parametrize("num_bytes", [0, 1, 3])
def test_text_cut_anywhere_survives(num_bytes):
    text = EMOJI[:num_bytes]
    assert Page(render_chunked_text(ChunkedText("t", text, (_stage(text, set()),)))).bytes_of_pre == [text]


def test_a_character_with_a_boundary_inside_falls_apart_into_its_bytes():
    text = b"a" + EMOJI + b"b"
    whole = render_chunked_text(ChunkedText("t", text, (_stage(text, {0, 1, 5}),)))
    cut = render_chunked_text(ChunkedText("t", text, (_stage(text, {0, 3}),)))

    assert "😀" in whole
    assert "😀" not in cut and "\\xf0" in cut
    assert Page(cut).bytes_of_pre == [text]
    assert cut.count('<span class="chunk chunk') == 2


def test_neighbouring_chunks_differ_in_colour_and_start_at_the_boundaries():
    text = b"one two three"
    fragment = render_chunked_text(ChunkedText("t", text, (_stage(text, {0, 3, 7}),)))

    chunks = re.findall(r'<span class="chunk chunk(\d)">(.*?)</span>', fragment)
    assert [colour for colour, _ in chunks] == ["0", "1", "0"]
    assert [re.sub("<.*?>", "", content) for _, content in chunks] == ["one", " two", " three"]


def test_each_seen_byte_shows_its_boundary_probability_and_no_other_does():
    text = b"a" + "é".encode() + b"bc"
    prob = np.array([1.0, 0.25, 0.02, np.nan, 0.5])
    fragment = render_chunked_text(ChunkedText("t", text, (StageChunks("s", prob, prob > 0.4),)))

    assert Page(fragment).attributes("data-p") == ["1.00", "0.25 0.02", "0.50"]
    assert "nan" not in fragment


def test_one_stage_is_shown_at_a_time():
    tags = Page(render_report(_data())).tags
    checked = ["checked" in attributes for tag, attributes in tags if tag == "input"]
    assert checked == [True, False, True]  # two stages of the first text, one of the second


def test_misaligned_stage_is_refused():
    with pytest.raises(ValueError, match=r"boundary_prob of stage0 has shape \(3,\).*needs \(4,\)"):
        ChunkedText("t", b"four", (_stage(b"abc", {0}),))


def test_chunk_lengths_cover_the_text():
    assert chunk_lengths(_stage(b"0123456789", {0, 4, 9})).tolist() == [4, 5, 1]
    assert chunk_lengths(_stage(b"0123456789", {4})).tolist() == [4, 6]  # the first byte starts one too
    assert chunk_lengths(_stage(b"", set())).tolist() == []


def test_page_is_balanced_and_holds_texts_and_samples_unharmed():
    page = Page(render_report(_data()))
    code = _data().texts[0].text
    assert page.bytes_of_pre[:4] == [code, code, HOSTILE, b"def " + HOSTILE]
    assert "script" not in {tag for tag, _ in page.tags}


def test_page_refers_to_nothing_outside():
    rendered = render_report(_data())
    page = Page(rendered)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object", "base")]
    for name in ("src", "href", "xlink:href", "srcset", "action"):
        assert not page.attributes(name)
    css = "".join(re.findall(r"<style>(.*?)</style>", rendered, re.DOTALL) + page.attributes("style"))
    assert "url(" not in css and "@import" not in css and "http" not in css
    assert any("default-src 'none'" in content for content in page.attributes("content"))


def test_headline_states_the_last_evaluation_and_the_run():
    page = render_report(_data())
    for fact in ("<b>2.260</b>", "after step 100 of 100", "463k", "3 min 2 s", "2 x cpu", "a &lt;run&gt;"):
        assert fact in page
    assert "<dt>bytes per chunk, stage1</dt><dd>13.50</dd>" in page


@pytest.mark.parametrize(("held_out", "expected"), [
    (5.0, "It beats no reference line yet: it is 0.30 bits per byte short of unigram (4.70)."),
    (3.0, "It predicts held-out text better than bigram (3.50) and unigram (4.70), "
          "and is 0.90 bits per byte short of zlib (2.10)."),
    (2.0, "It predicts held-out text better than every reference line: "
          "zlib (2.10), bigram (3.50) and unigram (4.70)."),
    (2.1, "It predicts held-out text better than bigram (3.50) and unigram (4.70), "
          "and is 0.00 bits per byte short of zlib (2.10)."),
])
def test_verdict_claims_only_what_the_numbers_say(held_out, expected):
    assert verdict(held_out, {"unigram": 4.7, "bigram": 3.5, "zlib": 2.1}) == expected


@pytest.mark.parametrize("changes", [
    dict(metrics=[]),
    dict(metrics=_metrics(10)),                                         # one point, no evaluation
    dict(metrics=[{"step": 0, "eval/bits_per_byte": 8.0}]),             # an evaluation before any training
    dict(metrics=[{"step": 5, "train/bits_per_byte": 3.0}] * 2, reference_lines={}),  # a line without extent
    dict(texts=()),
    dict(texts=(ChunkedText("isotropic", HOSTILE, ()),)),
    dict(texts=(ChunkedText("empty", b"", (_stage(b"", set()),)),)),
    dict(samples=(), reference_lines={}),
    dict(config={}, manifest={}),
], ids=lambda changes: "+".join(changes))
def test_an_unfinished_run_still_makes_a_page(changes):
    page = render_report(_data(**changes))
    Page(page)
    assert not re.search(r"\b(nan|inf|None)\b", page)


def test_a_run_without_evaluation_claims_no_score():
    page = render_report(_data(metrics=_metrics(10)))
    assert "has not been evaluated" in page
    assert 'class="score"' not in page


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "nan"])
def test_values_that_are_not_finite_are_left_out_and_counted(value):
    lines = _metrics(100)
    lines[0] |= {"train/bits_per_byte": value, "stage0/boundary_rate": value}
    lines[-1] |= {"eval/bits_per_byte": value}

    page = render_report(_data(metrics=lines))

    Page(page)
    assert "2 logged points are not finite and are not drawn." in page  # the loss figure
    assert "1 logged point is not finite and is not drawn." in page     # the boundary rate
    assert "after step 50 of 100" in page
    assert not re.search(r"\b(nan|inf|None)\b", page)


def test_reference_lines_are_named_at_their_height_and_kept_apart():
    steps = np.arange(1, 11)
    plot = line_plot([Series("train", steps, 8.0 / steps, Ink.LINE)], y_label="bits",
                     references={"zlib": 4.58, "unigram": 4.68})

    labels = re.findall(r'<text class="quiet" [^>]*y="([\d.]+)">(\w+ [\d.]+)<', plot)
    height = {text: float(y) for y, text in labels}
    lines = sorted(float(y) for y in re.findall(r'class="reference" d="M44 ([\d.]+)H', plot))
    assert abs(height["unigram 4.68"] - 4 - lines[0]) < 0.11
    assert height["zlib 4.58"] - height["unigram 4.68"] > 15
    assert len(lines) == 2


def test_histogram_counts_every_chunk_and_gathers_the_tail():
    lengths = np.array([1] * 60 + [2] * 39 + [500])
    plot, per_bar = histogram(lengths, y_label="%", width=NARROW)
    assert per_bar == 1
    assert re.findall(r"<title>from (.*?) %</title>", plot) == ["1: 60.0", "2: 39.0", "3+: 1.0"]

    plot, per_bar = histogram(np.arange(1, 101), y_label="%", width=NARROW)
    shares = [float(share) for share in re.findall(r": ([\d.]+) %</title>", plot)]
    assert per_bar == 5 and len(shares) == 21 and sum(shares) == pytest.approx(100)


@pytest.mark.parametrize(("value", "text"), [
    (0, "0.00"), (0.254, "0.25"), (9.996, "10.0"), (480, "480"), (9999, "9999"), (10_000, "10.0k"),
    (463_210, "463k"), (999_900, "1.00M"), (1.2e9, "1.20G"), (-3.456, "-3.46"),
])
def test_numbers_are_short(value, text):
    assert format_number(value) == text


def test_visible_text_of_plain_text_is_the_escaped_text():
    assert visible_text(b"a < b & c") == "a &lt; b &amp; c"
