"""The table and the plot of an experiment on a task, drawn from its finished runs alone."""
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.pages.pictures import Line, Lines, Row, Rows, picture
from experiments.pages.tables import format_number, markdown_table
from experiments.runs.grid import by_name, mean_and_deviation, origin
from experiments.tasks.results import Result
from experiments.tasks.settings import Column

MOST_CURVES = 3     # settings whose training is drawn; more would hide what came out
CURVE_POINTS = 25   # per curve

Chosen = dict[str, list[Result]]  # mixer -> its runs with the chosen learning rate


def choose_rates(results: Iterable[Result]) -> Chosen:
    """Keeps, for every mixer, the runs of the rate with the best mean over settings, seeds and columns.

    The means are those of the validation split. Rates with fewer finished runs than another are left out.
    """
    chosen = {}
    for mixer, tried in by_name(results, lambda result: result.mixer).items():
        by_rate = by_name(tried, lambda result: result.learning_rate)
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
        *(mean_and_deviation(_percent(runs, column), decimals=1) for column in columns),
        format_number(max(run.num_params for run in runs)),
        f"{statistics.fmean(run.train_seconds for run in runs):.0f}",
    ) for mixer, runs in chosen.items()]
    return (f"{markdown_table(header, rows)}\n\n"
            "Right answers on test sequences in per cent: means over seeds, ± the sample standard deviation. "
            "Rate: of the learning rates tried with a mixer, the one with the best mean over all columns on "
            "validation sequences, which are not those of training or test. Parameters: of the largest model. "
            "Seconds: of training a run, without compilation. "
            f"{origin([run for runs in chosen.values() for run in runs])}\n")


def render_plot(chosen: Chosen, columns: Sequence[Column]) -> str:
    """Returns an .svg file with a panel per kind of column, and under them the accuracy in training."""
    return picture(panels(chosen, columns))


def panels(chosen: Chosen, columns: Sequence[Column]) -> list[Lines | Rows]:
    """Returns the panels of the plot.

    A panel is a line per mixer over what its columns differ in, or a row per mixer where it has one column. Mixers
    that are not finished with all columns of a panel are left out of it.
    """
    ink = {mixer: index for index, mixer in enumerate(chosen)}
    drawn = []
    for title, each in by_name(columns, lambda column: column.panel).items():
        shown = {mixer: runs for mixer, runs in chosen.items() if all(_percent(runs, column) for column in each)}
        if shown:
            drawn.append(_rows(each[0], shown, ink) if len(each) == 1 else _lines(title, each, shown, ink))
    settings = dict.fromkeys(run.setting for runs in chosen.values() for run in runs if run.curve)
    if len(settings) <= MOST_CURVES:
        drawn += [_curves(setting, f" on {setting}" if len(settings) > 1 else "", chosen, ink)
                  for setting in settings]
    return drawn


def _rows(column: Column, shown: Chosen, ink: dict[str, int]) -> Rows:
    shares = {mixer: np.array(_percent(runs, column)) for mixer, runs in shown.items()}
    rows = [Row(f"{mixer} {mean_and_deviation(each, decimals=1)}", ink[mixer], each)
            for mixer, each in shares.items()]
    return Rows(f"right answers in per cent, {column.name}: a dot per seed", rows)


def _lines(title: str, columns: list[Column], shown: Chosen, ink: dict[str, int]) -> Lines:
    columns = sorted(columns, key=lambda column: column.x)
    x, lines = np.array([column.x for column in columns]), []
    for mixer, runs in shown.items():
        shares = [_percent(runs, column) for column in columns]
        mean, low, high = (np.array([of(each) for each in shares]) for of in (np.mean, min, max))
        lines.append(Line(mixer, ink[mixer], x, mean, band=(low, high)))
    return Lines(f"right answers in per cent: {title}", lines, x_label="", from_zero=True)


def _curves(setting: str, where: str, chosen: Chosen, ink: dict[str, int]) -> Lines:
    lines = []
    for mixer, runs in chosen.items():
        curves = [run.curve for run in runs if run.setting == setting]
        shared = min(map(len, curves), default=0)  # one that diverged is shorter
        y = 100 * np.array([[each.accuracy for each in curve[:shared]] for curve in curves])  # [seeds, calls]
        # Calls differ in what they draw from: their means over a part of training do not.
        parts = [part for part in np.array_split(np.arange(shared), CURVE_POINTS) if len(part)]
        x = np.array([curves[0][part[-1]].step for part in parts])
        lines.append(Line(mixer, ink[mixer], x, np.array([y[:, part].mean() for part in parts])))
    return Lines(f"right answers in per cent, in training{where}", lines, from_zero=True)


def _percent(runs: list[Result], column: Column) -> list[float]:
    """Returns one number per seed."""
    return [100 * run.test[column.name] for run in runs if column.name in run.test]
