"""One HTML page for a training run, from plain data: what was learned, how it chunks, how fast, from what.

The page stands alone: no script, no font, no file beside it, and a content security policy that lets a
browser load nothing. What is missing (a run that has only begun, a model without stages) is said in words.
"""
import dataclasses
import html
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.pages.chunk_html import CHUNK_CSS, ChunkedText, chunk_lengths, render_chunked_text, visible_text
from experiments.pages.svg import NARROW, PLOT_CSS, WIDE, Series, format_number, histogram, line_plot


@dataclasses.dataclass(frozen=True)
class ReportData:
    """What a report is drawn from; every part may be empty.

    The page shows config and manifest whole. Its headline takes "num_steps" from the config and
    "num_params", "train_seconds", "device_kind" and "device_count" from the manifest, each if it is there.
    """
    name: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]           # lines of metrics.jsonl: "step" and numbers, finite or not
    reference_lines: dict[str, float]       # bits per byte
    texts: tuple[ChunkedText, ...]
    samples: tuple[tuple[str, bytes], ...]  # (prompt, continuation)


def render_report(data: ReportData) -> str:
    """Returns the whole page."""
    sections = (
        ("Loss", _loss(data)),
        ("Chunks on held-out text", _chunks(data)),
        ("Chunk lengths", _chunk_lengths(data)),
        ("Boundary rate", _boundary_rate(data)),
        ("Throughput", _throughput(data)),
        ("Samples", _samples(data)),
        ("How this run was made", _details(data)),
    )
    return html_page(f"{data.name}: training report", _headline(data), sections)


def html_page(title: str, headline: str, sections: Sequence[tuple[str, str]], *, css: str = "") -> str:
    """Returns a page that stands alone, of (heading, HTML) sections; those without content are left out.

    Args:
      headline: HTML above the sections.
      css: more of it, after that of pages, plots and chunks.
    """
    body = "".join(f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections if content)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title>"
        f"<style>{PAGE_CSS}{PLOT_CSS}{CHUNK_CSS}{css}</style></head>"
        f"<body><main>{headline}{body}</main></body></html>\n")


def verdict(held_out: float, reference_lines: dict[str, float]) -> str:
    """Says which reference lines `held_out` (bits per byte) is below, and how far away the next one is."""
    if not reference_lines:
        return "There are no reference lines to compare it with."
    beaten = {name: value for name, value in reference_lines.items() if held_out < value}
    ahead = {name: value for name, value in reference_lines.items() if held_out >= value}
    beaten_text = _enumeration([f"{name} ({beaten[name]:.2f})" for name in sorted(beaten, key=beaten.get)])
    if not ahead:
        return f"It predicts held-out text better than every reference line: {beaten_text}."
    nearest, value = max(ahead.items(), key=lambda item: item[1])
    gap = f"{held_out - value:.2f} bits per byte short of {nearest} ({value:.2f})"
    if not beaten:
        return f"It beats no reference line yet: it is {gap}."
    return f"It predicts held-out text better than {beaten_text}, and is {gap}."


def _enumeration(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _headline(data: ReportData) -> str:
    steps, held_out = _finite(data.metrics, "eval/bits_per_byte")
    if len(steps):
        planned = f" of {data.config['num_steps']}" if "num_steps" in data.config else ""
        score = (f'<p class="score"><b>{held_out[-1]:.3f}</b> '
                 f"<span>bits per byte on held-out text, after step {steps[-1]}{planned}</span></p>")
        judgement = verdict(held_out[-1], data.reference_lines)
    else:
        score, judgement = "", "This run has not been evaluated on held-out text yet."
    facts = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
                    for name, value in _facts(data))
    facts = f'<dl class="facts">{facts}</dl>' if facts else ""
    return (f'<header><p class="eyebrow">Training report</p><h1>{html.escape(data.name)}</h1>{score}'
            f'<p class="verdict">{html.escape(judgement)}</p>{facts}</header>')


def _facts(data: ReportData) -> list[tuple[str, str]]:
    manifest = data.manifest
    facts = [(f"bytes per chunk, {name}", f"{lengths.mean():.2f}")
             for name, lengths in _lengths_by_stage(data)]
    if "num_params" in manifest:
        facts.append(("parameters", format_number(manifest["num_params"])))
    if "train_seconds" in manifest:
        facts.append(("training time", _duration(manifest["train_seconds"])))
    if "device_kind" in manifest:
        count = manifest.get("device_count", 1)
        facts.append(("device", ("" if count == 1 else f"{count} x ") + manifest["device_kind"]))
    return facts


def _loss(data: ReportData) -> str:
    steps, loss = _finite(data.metrics, "train/bits_per_byte")
    eval_steps, held_out = _finite(data.metrics, "eval/bits_per_byte")
    if not len(steps) and not len(eval_steps):
        return note("No loss has been logged yet.")
    window = max(1, len(loss) // 20)
    plot = line_plot(
        [Series("", steps, loss, "faint"), Series("train", steps, _smoothed(loss, window), "line"),
         Series("held-out", eval_steps, held_out, "dots")],
        y_label="bits per byte", references=data.reference_lines)
    caption = []
    if len(loss):
        smoothing = f", raw (faint) and as the mean over {window} logged values" if window > 1 else ""
        caption.append(f"Line: training loss{smoothing}.")
    if len(eval_steps):
        caption.append("Dots: evaluations on held-out text.")
    if data.reference_lines:
        caption.append("Dashed: what simple models reach on held-out text.")
    caption.append(_left_out(data.metrics, "train/bits_per_byte", "eval/bits_per_byte"))
    return figure(plot, " ".join(caption))


def _chunks(data: ReportData) -> str:
    if not data.texts:
        return note("No held-out text was given to this report.")
    num_stages = max(len(text.stages) for text in data.texts)
    if not num_stages:
        legend = "This model has no stages: it reads every byte at full depth, so there are no chunks."
    else:
        legend = ("Each change of colour is a boundary the model chose. The underline shows how probable a "
                  "boundary was before a character; point at one, or touch it, for the number.")
    if num_stages > 1:
        legend += " An inner stage sees, and underlines, only the starts of the chunks outside it."
    return note(legend) + "".join(render_chunked_text(text) for text in data.texts)


def _chunk_lengths(data: ReportData) -> str:
    by_stage = _lengths_by_stage(data)
    if not by_stage:
        return note("Without chunks there are no lengths to count.")
    figures = ""
    for name, lengths in by_stage:
        plot, per_bar = histogram(
            lengths, y_label="% of chunks, by bytes per chunk", width=WIDE if len(by_stage) == 1 else NARROW)
        caption = f"{name}: {len(lengths)} chunks in the texts above, {lengths.mean():.2f} bytes on average, "
        caption += f"longest {lengths.max()}." + (f" A bar is {per_bar} bytes wide." if per_bar > 1 else "")
        figures += figure(plot, caption)
    return f'<div class="figures">{figures}</div>'


def _boundary_rate(data: ReportData) -> str:
    names = {key for line in data.metrics for key in line if re.fullmatch(r"stage\d+/boundary_rate", key)}
    series = [
        Series(name.partition("/")[0], *_finite(data.metrics, name), kind)
        for name, kind in zip(sorted(names), itertools.cycle(("line", "line other")))
    ]
    if not any(len(s.x) for s in series):
        return note("No boundary rate has been logged.")
    caption = "The share of the positions a stage sees that start a chunk."
    return figure(line_plot(series, y_label="boundaries per position", from_zero=True),
                   f"{caption} {_left_out(data.metrics, *names)}")


def _throughput(data: ReportData) -> str:
    steps, rate = _finite(data.metrics, "perf/bytes_per_second")
    if not len(steps):
        return note("No throughput has been logged yet.")
    plot = line_plot([Series("", steps, rate, "line")], y_label="bytes per second", from_zero=True)
    caption = f"Median: {format_number(float(np.median(rate)))} bytes of training text per second."
    return figure(plot, f"{caption} {_left_out(data.metrics, 'perf/bytes_per_second')}")


def _samples(data: ReportData) -> str:
    if not data.samples:
        return note("No text was generated.")
    samples = note("Written by the model; the prompt is set in grey.")
    for prompt, continuation in data.samples:
        prompt_text = visible_text(prompt.encode("utf-8", "surrogateescape"))
        samples += (f'<pre class="chunk-text"><span class="prompt">{prompt_text}</span>'
                    f"{visible_text(continuation)}</pre>")
    return samples


def _details(data: ReportData) -> str:
    files = {"config.json": data.config, "manifest.json": data.manifest}
    return "".join(
        f"<details><summary>{name}</summary>"
        f"<pre>{html.escape(json.dumps(content, indent=2, default=str))}</pre></details>"
        for name, content in files.items())


def _finite(metrics: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and values of the lines where `name` is a finite number."""
    points = [(line["step"], line[name]) for line in metrics if _is_finite(line.get(name))]
    return np.array([step for step, _ in points]), np.array([value for _, value in points], float)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _left_out(metrics: Sequence[dict[str, Any]], *names: str) -> str:
    count = sum(not _is_finite(line[name]) for line in metrics for name in names if name in line)
    return f"Not drawn, for want of a finite value: {count} of the logged points." if count else ""


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean over `window` values around each, or over those of them that exist. [num_values]"""
    if not len(values):
        return values
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _lengths_by_stage(data: ReportData) -> list[tuple[str, np.ndarray]]:
    """Returns (stage, bytes in each of its chunks) over all texts, outermost first."""
    lengths: dict[str, list[np.ndarray]] = {}
    for text in data.texts:
        for stage in text.stages:
            lengths.setdefault(stage.name, []).append(chunk_lengths(stage))
    joined = [(name, np.concatenate(parts)) for name, parts in lengths.items()]
    return [(name, parts) for name, parts in joined if len(parts)]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def figure(plot: str, caption: str) -> str:
    return f"<figure>{plot}<figcaption>{html.escape(caption)}</figcaption></figure>"


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


PAGE_CSS = """
:root { --paper: #fff; --ink: #1d2126; --soft: #4b535b; --faint: #737b83; --frame: #e3e6e9; --code: #f6f7f8;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181b; --ink: #e9ecef; --soft: #b3bac1; --faint: #8b939b; --frame: #2c3238;
    --code: #1b1f23; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-x: hidden;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
main { max-width: 808px; margin: 0 auto; padding: 4.5rem 1.5rem 6rem; }
section { margin-top: 4.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; font-weight: 650; margin: 0 0 2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; font-weight: 650; margin: 0 0 1rem; }
.eyebrow { margin: 0 0 .3rem; color: var(--faint); font-size: .88rem; }
.score { margin: 0 0 1rem; display: flex; flex-wrap: wrap; align-items: baseline; gap: .3rem .9rem;
  color: var(--soft); }
.score b { font-size: 3.6rem; line-height: 1; font-weight: 650; letter-spacing: -.02em; color: var(--ink);
  font-variant-numeric: tabular-nums; }
.verdict { margin: 0; max-width: 38rem; font-size: 1.1rem; }
.facts { display: flex; flex-wrap: wrap; gap: 1.2rem 2.4rem; margin: 2rem 0 0; padding-top: 1.3rem;
  border-top: 1px solid var(--frame); }
dt { font-size: .85rem; color: var(--faint); }
dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figcaption, .note { margin: .7rem 0 0; max-width: 42rem; font-size: .9rem; color: var(--soft); }
.note { margin: 0 0 1.5rem; }
.figures { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
section > .chunk-text { margin-top: 1rem; }
.prompt { color: var(--faint); }
details { border-top: 1px solid var(--frame); padding: .7rem 0; }
details:last-child { border-bottom: 1px solid var(--frame); }
summary { cursor: pointer; }
details pre { background: var(--code); border-radius: 6px; padding: 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere;
  font: .8rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
small { color: var(--faint); font-size: .85em; }
@media (max-width: 600px) {
  main { padding: 2.5rem 1.1rem 4rem; }
  section { margin-top: 3.2rem; }
  .score b { font-size: 3rem; }
  .facts { display: grid; grid-template-columns: 1fr 1fr; } }
"""
