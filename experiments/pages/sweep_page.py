"""What a sweep found: a table in Markdown and a plot, drawn from the results of its finished runs alone."""
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from experiments.pages.svg import Row, Series, colour, format_number, line_plot, row_plot, standalone

BITS = "eval/bits_per_byte"


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished run."""

    config: str                         # name of the config
    seed: int
    evaluations: list[dict[str, float]]  # the records of metrics.jsonl with evaluations, by rising step
    num_params: int
    flops_per_byte: float               # of the forward pass, with the chunks of the last evaluation
    train_seconds: float
    commit: str                         # and the rest of its manifest that tells where the numbers come from
    is_dirty: bool
    device: str
    versions: dict[str, str]

    @property
    def last(self) -> dict[str, float]:
        return self.evaluations[-1]

    @property
    def bits_per_byte(self) -> float:
        return self.last[BITS]

    @property
    def bytes_per_chunk(self) -> tuple[float, ...]:
        """One number per chunking stage, outermost first."""
        return _per_stage(self.last, "bytes_per_chunk")


def tokens_per_chunk(evaluation: dict[str, float]) -> tuple[float, ...]:
    """Returns how many tokens of each chunking stage share a chunk, outermost first."""
    return tuple(1 / rate for rate in _per_stage(evaluation, "boundary_rate"))


def _per_stage(evaluation: dict[str, float], name: str) -> tuple[float, ...]:
    num_stages = sum(key.endswith(f"/{name}") for key in evaluation)
    return tuple(evaluation[f"eval/stage{index}/{name}"] for index in range(num_stages))


def render_table(results: Iterable[Result]) -> str:
    """Returns one row per config, in the order in which they come, and under it what the numbers are."""
    header = ("config", "seeds", "held-out bits per byte", "bytes per chunk", "MFLOPs per byte", "parameters",
              "seconds")
    rows = [(
        name,
        str(len(runs)),
        _mean_and_deviation([run.bits_per_byte for run in runs]),
        ", ".join(f"{np.mean(each):.2f}" for each in zip(*(run.bytes_per_chunk for run in runs), strict=True))
        or "no chunks",
        f"{_mean(runs, lambda run: run.flops_per_byte) / 1e6:.3f}",
        format_number(_mean(runs, lambda run: run.num_params)),
        f"{_mean(runs, lambda run: run.train_seconds):.0f}",
    ) for name, runs in _by_config(results).items()]
    return f"{markdown_table(header, rows)}\n\n{_footnote(list(results))}\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_table_line(header, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    return "\n".join(lines + [_table_line(row, widths) for row in rows])


def _table_line(cells: Iterable[str], widths: Iterable[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join(padded)} |"


def _footnote(results: list[Result]) -> str:
    def all_of(values: Iterable[Any]) -> str:
        return " and ".join(sorted({str(value) for value in values}))

    steps = all_of(f"{result.last['step']:,}" for result in results)
    commits = all_of(f"{result.commit[:7]}{' with changes' if result.is_dirty else ''}" for result in results)
    jax, python = (all_of(result.versions[name] for result in results) for name in ("jax", "python"))
    return ("Means over seeds, ± the sample standard deviation. Bits per byte and chunks: held-out text after "
            f"step {steps}. FLOPs: the forward pass, with those chunks. Seconds: of training steps alone. "
            f"{all_of(result.device for result in results)}, Python {python}, jax {jax}, commit {commits}.")


def render_plot(results: Iterable[Result]) -> str:
    """Returns an .svg file: held-out bits per byte over training, and below it the last value of each run."""
    groups = _by_config(results)
    series, rows = [], []
    for index, (name, runs) in enumerate(zip(_without_common_start(list(groups)), groups.values(), strict=True)):
        steps, bits = _curves(runs)
        last, titles = bits[:, -1], [f"seed {run.seed}: {run.bits_per_byte:.4f}" for run in runs]
        series.append(Series(name, steps, bits.mean(axis=0), f"line {colour(index)}",
                             band=(bits.min(axis=0), bits.max(axis=0))))
        rows.append(Row(f"{name} {_mean_and_deviation(last)}", last, titles, colour(index)))
    return standalone([
        line_plot(series, y_label="bits per byte on held-out text: mean over seeds, and their range"),
        row_plot(rows, x_label="the same after the last step: a dot per seed, a bar at their mean"),
    ])


def _curves(runs: list[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps at which every one of the runs was evaluated, and the values there. [s], [runs, s]"""
    by_step = [{record["step"]: record[BITS] for record in run.evaluations} for run in runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    return np.array(steps), np.array([[values[step] for step in steps] for values in by_step])


def _by_config(results: Iterable[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.config, []).append(result)
    return groups


def _without_common_start(names: list[str]) -> list[str]:
    """["compare_learned", "compare_space"] -> ["learned", "space"]."""
    words = names[0].split("_")[:-1] if len(names) > 1 else []
    while words and not all(name.startswith("_".join(words) + "_") for name in names):
        words.pop()
    return [name.removeprefix("_".join([*words, ""])) for name in names]


def _mean(runs: list[Result], of: Callable[[Result], float]) -> float:
    return statistics.fmean(map(of, runs))


def _mean_and_deviation(values: Iterable[float]) -> str:
    values = [float(value) for value in values]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"
