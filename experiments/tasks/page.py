"""What an experiment on a task found: a table in Markdown and a plot, drawn from its finished runs alone."""
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.pages.svg import Row, Series, colour, format_number, line_plot, row_plot, standalone
from experiments.pages.sweep_page import markdown_table
from experiments.tasks.results import Result
from experiments.tasks.settings import Column

MOST_CURVES = 3     # settings whose training is drawn; more would hide what came out
CURVE_POINTS = 25   # per curve

Chosen = dict[str, list[Result]]  # mixer -> its runs with the chosen learning rate


def choose_rates(results: Iterable[Result]) -> Chosen:
    """Keeps, for every mixer, the runs of the rate with the best mean over settings, seeds and columns.

    The means are those of the validation split. Rates with fewer finished runs than another are left out.
    """
    by_mixer: dict[str, dict[float, list[Result]]] = {}
    for result in results:
        by_mixer.setdefault(result.mixer, {}).setdefault(result.learning_rate, []).append(result)
    chosen = {}
    for mixer, by_rate in by_mixer.items():
        most = max(map(len, by_rate.values()))
        complete = [runs for runs in by_rate.values() if len(runs) == most]
        chosen[mixer] = max(complete, key=lambda runs: statistics.fmean(
            share for run in runs for share in run.validation.values()))
    return chosen


def render_table(chosen: Chosen, columns: Sequence[Column]) -> str:
    """Returns one row per mixer, one column per column of the settings, and under it what the numbers are."""
    header = ("mixer", "rate", "seeds", *(column.name for column in columns), "parameters", "seconds")
    rows = [(
        mixer,
        f"{runs[0].learning_rate:g}",
        str(len({run.seed for run in runs})),
        *(_mean_and_deviation(_percent(runs, column)) for column in columns),
        format_number(max(run.num_params for run in runs)),
        f"{statistics.fmean(run.train_seconds for run in runs):.0f}",
    ) for mixer, runs in chosen.items()]
    return f"{markdown_table(header, rows)}\n\n{_footnote([run for runs in chosen.values() for run in runs])}\n"


def _footnote(results: list[Result]) -> str:
    def all_of(values: Iterable[object]) -> str:
        return " and ".join(sorted({str(value) for value in values}))

    commits = all_of(f"{result.commit[:7]}{' with changes' if result.is_dirty else ''}" for result in results)
    jax, python = (all_of(result.versions[name] for result in results) for name in ("jax", "python"))
    return ("Right answers on test sequences in per cent: means over seeds, ± the sample standard deviation. "
            "Rate: of the learning rates tried with a mixer, the one with the best mean over all columns on "
            "validation sequences, which are not those of training or test. Parameters: of the largest model. "
            f"Seconds: of training a run, without compilation. {all_of(result.device for result in results)}, "
            f"Python {python}, jax {jax}, commit {commits}.")


def render_plot(chosen: Chosen, columns: Sequence[Column]) -> str:
    """Returns an .svg file with a panel per kind of column, and under them the accuracy in training.

    A panel is a line per mixer over what its columns differ in, or a row per mixer where it has one column. Mixers
    that are not finished with all columns of a panel are left out of it.
    """
    panels: dict[str, list[Column]] = {}
    for column in columns:
        panels.setdefault(column.panel, []).append(column)
    ink = {mixer: index for index, mixer in enumerate(chosen)}
    drawn = []
    for title, each in panels.items():
        shown = {mixer: runs for mixer, runs in chosen.items() if all(_percent(runs, column) for column in each)}
        if shown:
            drawn.append(_rows(each[0], shown, ink) if len(each) == 1 else _lines(title, each, shown, ink))
    settings = dict.fromkeys(run.setting for runs in chosen.values() for run in runs if run.curve)
    if len(settings) <= MOST_CURVES:
        drawn += [_curves(setting, f" on {setting}" if len(settings) > 1 else "", chosen, ink)
                  for setting in settings]
    return standalone(drawn)


def _rows(column: Column, shown: Chosen, ink: dict[str, int]) -> str:
    rows = []
    for mixer, runs in shown.items():
        seeds = [run.seed for run in runs if column.name in run.test]
        shares = _percent(runs, column)
        titles = [f"seed {seed}: {share:.2f} %" for seed, share in zip(seeds, shares, strict=True)]
        rows.append(Row(f"{mixer} {_mean_and_deviation(shares)}", np.array(shares), titles, colour(ink[mixer])))
    return row_plot(rows, x_label=f"right answers in per cent, {column.name}: a dot per seed")


def _lines(title: str, columns: list[Column], shown: Chosen, ink: dict[str, int]) -> str:
    columns = sorted(columns, key=lambda column: column.x)
    x, series = np.array([column.x for column in columns]), []
    for mixer, runs in shown.items():
        shares = [_percent(runs, column) for column in columns]
        mean, low, high = (np.array([of(each) for each in shares]) for of in (np.mean, min, max))
        series.append(Series(mixer, x, mean, _kind(ink[mixer]), band=(low, high)))
    return line_plot(series, y_label=f"right answers in per cent: {title}", x_label="", from_zero=True)


def _curves(setting: str, where: str, chosen: Chosen, ink: dict[str, int]) -> str:
    series = []
    for mixer, runs in chosen.items():
        curves = [run.curve for run in runs if run.setting == setting]
        shared = min(map(len, curves), default=0)  # one that diverged is shorter
        y = 100 * np.array([[each.accuracy for each in curve[:shared]] for curve in curves])  # [seeds, calls]
        # Calls differ in what they draw from: their means over a part of training do not.
        parts = [part for part in np.array_split(np.arange(shared), CURVE_POINTS) if len(part)]
        x = np.array([curves[0][part[-1]].step for part in parts])
        series.append(Series(mixer, x, np.array([y[:, part].mean() for part in parts]), _kind(ink[mixer])))
    return line_plot(series, y_label=f"right answers in per cent, in training{where}", from_zero=True)


def _kind(index: int) -> str:
    return f"line {colour(index)}{' dashed' if index >= 6 else ''}"  # there are six colours


def _percent(runs: list[Result], column: Column) -> list[float]:
    """One number per seed."""
    return [100 * run.test[column.name] for run in runs if column.name in run.test]


def _mean_and_deviation(values: Iterable[float]) -> str:
    values = [float(value) for value in values]
    if not values:
        return "not run"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"
