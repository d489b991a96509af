"""One HTML page for a training run, from plain data: what was learned, how it chunks, how fast, from what.

The numbers are made here, the words of the page are in report.html.jinja. Whatever is missing (a run that has only
begun, a model without stages) is said in words.
"""
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.analysis.chunked_text import ChunkedText, chunk_lengths
from experiments.pages.chunk_html import render_chunked_text, visible_text
from experiments.pages.html import Figure, length_figures, render_page
from experiments.pages.svg import Ink, Series, line_plot
from experiments.pages.tables import format_number


@dataclasses.dataclass(frozen=True)
class ReportData:
    """The contents of a report; every part may be empty.

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
    lengths = _lengths_by_stage(data)
    return render_page(
        "report.html.jinja",
        name=data.name,
        score=_score(data),
        verdict=_verdict_of(data),
        facts=_facts(data, lengths),
        loss=_loss(data),
        unit="byte" if all(text.token_starts is None for text in data.texts) else "token",
        num_stages=max((len(text.stages) for text in data.texts), default=0),
        texts=[render_chunked_text(text) for text in data.texts],
        lengths=length_figures(lengths, _lengths_caption),
        boundary_rate=_boundary_rate(data),
        throughput=_throughput(data),
        samples=[(visible_text(prompt.encode("utf-8", "surrogateescape")), visible_text(continuation))
                 for prompt, continuation in data.samples],
        files={name: json.dumps(content, indent=2, default=str)
               for name, content in (("config.json", data.config), ("manifest.json", data.manifest))},
    )


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


def _score(data: ReportData) -> dict[str, str] | None:
    """Returns the last evaluation as the page writes it, or None before the first."""
    steps, held_out = _finite(data.metrics, "eval/bits_per_byte")
    if not len(steps):
        return None
    planned = f" of {data.config['num_steps']}" if "num_steps" in data.config else ""
    return {"bits": f"{held_out[-1]:.3f}", "step": f"{steps[-1]}{planned}"}


def _verdict_of(data: ReportData) -> str:
    _, held_out = _finite(data.metrics, "eval/bits_per_byte")
    if not len(held_out):
        return "This run has not been evaluated on held-out text yet."
    return verdict(held_out[-1], data.reference_lines)


def _facts(data: ReportData, lengths: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    manifest = data.manifest
    facts = [(f"bytes per chunk, {name}", f"{each.mean():.2f}") for name, each in lengths.items()]
    if "num_params" in manifest:
        facts.append(("parameters", format_number(manifest["num_params"])))
    if "train_seconds" in manifest:
        facts.append(("training time", _duration(manifest["train_seconds"])))
    if "device_kind" in manifest:
        count = manifest.get("device_count", 1)
        facts.append(("device", ("" if count == 1 else f"{count} x ") + manifest["device_kind"]))
    return facts


def _loss(data: ReportData) -> Figure | None:
    steps, loss = _finite(data.metrics, "train/bits_per_byte")
    eval_steps, held_out = _finite(data.metrics, "eval/bits_per_byte")
    if not len(steps) and not len(eval_steps):
        return None
    window = max(1, len(loss) // 20)
    plot = line_plot(
        [Series("", steps, loss, Ink.FAINT), Series("train", steps, _smoothed(loss, window), Ink.LINE),
         Series("held-out", eval_steps, held_out, Ink.DOTS)],
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
    return Figure(plot, " ".join(caption))


def _lengths_caption(name: str, lengths: np.ndarray) -> str:
    return (f"{name}: {len(lengths)} chunks in the texts above, {lengths.mean():.2f} bytes on average, "
            f"longest {lengths.max()}.")


def _boundary_rate(data: ReportData) -> Figure | None:
    names = {key for line in data.metrics for key in line if re.fullmatch(r"stage\d+/boundary_rate", key)}
    series = [
        Series(name.partition("/")[0], *_finite(data.metrics, name), ink)
        for name, ink in zip(sorted(names), itertools.cycle((Ink.LINE, Ink.OTHER)))
    ]
    if not any(len(s.x) for s in series):
        return None
    caption = "The share of the positions a stage sees that start a chunk."
    return Figure(line_plot(series, y_label="boundaries per position", from_zero=True),
                  f"{caption} {_left_out(data.metrics, *names)}")


def _throughput(data: ReportData) -> Figure | None:
    steps, rate = _finite(data.metrics, "perf/bytes_per_second")
    if not len(steps):
        return None
    plot = line_plot([Series("", steps, rate, Ink.LINE)], y_label="bytes per second", from_zero=True)
    caption = f"Median: {format_number(float(np.median(rate)))} bytes of training text per second."
    return Figure(plot, f"{caption} {_left_out(data.metrics, 'perf/bytes_per_second')}")


def _finite(metrics: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and values of the lines where `name` is a finite number."""
    points = [(line["step"], line[name]) for line in metrics if _is_finite(line.get(name))]
    return np.array([step for step, _ in points]), np.array([value for _, value in points], float)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _left_out(metrics: Sequence[dict[str, Any]], *names: str) -> str:
    count = sum(not _is_finite(line[name]) for line in metrics for name in names if name in line)
    if not count:
        return ""
    return f"{count} logged points are not finite and are not drawn." if count > 1 else (
        "1 logged point is not finite and is not drawn.")


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean over `window` values around each, or over those of them that exist. [num_values]"""
    if not len(values):
        return values
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _lengths_by_stage(data: ReportData) -> dict[str, np.ndarray]:
    """Returns the bytes in each chunk of a stage over all texts, outermost first."""
    lengths: dict[str, list[np.ndarray]] = {}
    for text in data.texts:
        for stage in text.stages:
            lengths.setdefault(stage.name, []).append(chunk_lengths(stage))
    joined = {name: np.concatenate(parts) for name, parts in lengths.items()}
    return {name: each for name, each in joined.items() if len(each)}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
