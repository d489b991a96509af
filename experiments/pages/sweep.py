"""The table and the plot of a sweep, drawn from the results of its finished runs alone."""
import dataclasses
import statistics
from collections.abc import Callable, Iterable

import numpy as np

from experiments.pages.pictures import Line, Lines, Row, Rows, picture
from experiments.pages.tables import format_number, markdown_table
from experiments.runs.grid import all_of, by_name, mean_and_deviation, origin

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
    results = list(results)
    header = ("config", "seeds", "held-out bits per byte", "bytes per chunk", "MFLOPs per byte", "parameters",
              "seconds")
    rows = [(
        name,
        str(len(runs)),
        mean_and_deviation([run.bits_per_byte for run in runs], decimals=3),
        ", ".join(f"{np.mean(each):.2f}" for each in zip(*(run.bytes_per_chunk for run in runs), strict=True))
        or "no chunks",
        f"{_mean(runs, lambda run: run.flops_per_byte) / 1e6:.3f}",
        format_number(_mean(runs, lambda run: run.num_params)),
        f"{_mean(runs, lambda run: run.train_seconds):.0f}",
    ) for name, runs in by_name(results, _config_of).items()]
    steps = all_of(f"{result.last['step']:,}" for result in results)
    return (f"{markdown_table(header, rows)}\n\n"
            "Means over seeds, ± the sample standard deviation. Bits per byte and chunks: held-out text after "
            f"step {steps}. FLOPs: the forward pass, with those chunks. Seconds: of training steps alone. "
            f"{origin(results)}\n")


def render_plot(results: Iterable[Result]) -> str:
    """Returns an .svg file: held-out bits per byte over training, and below it the last value of each run."""
    return picture(panels(results))


def panels(results: Iterable[Result]) -> tuple[Lines, Rows]:
    """Returns the two panels of the plot."""
    groups = by_name(results, _config_of)
    lines, rows = [], []
    for ink, (name, runs) in enumerate(zip(_without_common_start(list(groups)), groups.values(), strict=True)):
        steps, bits = _curves(runs)
        lines.append(Line(name, ink, steps, bits.mean(axis=0), band=(bits.min(axis=0), bits.max(axis=0))))
        rows.append(Row(f"{name} {mean_and_deviation(bits[:, -1], decimals=3)}", ink, bits[:, -1]))
    return (Lines("bits per byte on held-out text: mean over seeds, and their range", lines),
            Rows("the same after the last step: a dot per seed, a bar at their mean", rows))


def _curves(runs: list[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps at which every one of the runs was evaluated, and the values there. [s], [runs, s]"""
    by_step = [{record["step"]: record[BITS] for record in run.evaluations} for run in runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    return np.array(steps), np.array([[values[step] for step in steps] for values in by_step])


def _config_of(result: Result) -> str:
    return result.config


def _without_common_start(names: list[str]) -> list[str]:
    """Shortens ["compare_learned", "compare_space"] to ["learned", "space"]."""
    words = names[0].split("_")[:-1] if len(names) > 1 else []
    while words and not all(name.startswith("_".join(words) + "_") for name in names):
        words.pop()
    return [name.removeprefix("_".join([*words, ""])) for name in names]


def _mean(runs: list[Result], of: Callable[[Result], float]) -> float:
    return statistics.fmean(map(of, runs))
