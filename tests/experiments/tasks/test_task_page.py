"""The table and the plot of an experiment on a task show its runs, number by number."""
import dataclasses

import numpy as np

from experiments.pages.pictures import Lines, Rows
from experiments.tasks.page import choose_rates, panels, render_plot, render_table
from experiments.tasks.results import Result
from experiments.tasks.settings import Column
from experiments.tasks.training import Measured

COLUMNS = [Column("4 pairs", "recall", 4, None), Column("8 pairs", "recall", 8, None),
           Column("noise, 3 symbols", "noise", 3, None)]


def _result(mixer: str, seed: int, rate: float, validation: float, test: float) -> Result:
    def shares(value: float) -> dict[str, float]:
        return {column.name: value - 0.1 * index for index, column in enumerate(COLUMNS)}

    return Result(
        mixer=mixer, setting="all", seed=seed, learning_rate=rate, validation=shares(validation),
        test=shares(test), curve=[Measured(10, 2.0, 0.1), Measured(20, 1.0, test)], diverged_at=0,
        num_params=49_600, train_seconds=61.0 + seed, commit="90e4ef8abc", is_dirty=False, device="cpu",
        versions={"jax": "0.10.2", "python": "3.11.7"}, config={})


RESULTS = [
    _result("t", 0, 1e-3, 0.9, 0.8), _result("t", 1, 1e-3, 0.9, 0.9),
    _result("t", 0, 1e-2, 0.8, 0.99), _result("t", 1, 1e-2, 0.8, 0.99),  # better on the test alone
    _result("m", 0, 1e-3, 0.99, 0.99),                                   # its other seed is not finished
    _result("m", 0, 1e-2, 0.5, 0.6), _result("m", 1, 1e-2, 0.5, 0.4),
]


def test_rates_are_chosen_on_the_validation_split_among_those_with_all_seeds():
    chosen = choose_rates(RESULTS)
    assert {mixer: [(run.seed, run.learning_rate) for run in runs] for mixer, runs in chosen.items()} == {
        "t": [(0, 1e-3), (1, 1e-3)], "m": [(0, 1e-2), (1, 1e-2)]}


def test_the_table_has_a_row_per_mixer_and_says_what_its_numbers_are():
    header, _, *rows, empty, footnote = render_table(choose_rates(RESULTS), COLUMNS).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (header, *rows)]
    assert cells == [
        ["mixer", "rate", "seeds", "4 pairs", "8 pairs", "noise, 3 symbols", "parameters", "seconds"],
        ["t", "0.001", "2", "85.0 ± 7.1", "75.0 ± 7.1", "65.0 ± 7.1", "49.6k", "62"],
        ["m", "0.01", "2", "50.0 ± 14.1", "40.0 ± 14.1", "30.0 ± 14.1", "49.6k", "62"]]
    assert empty == "" and "on validation sequences" in footnote
    assert footnote.endswith("cpu, Python 3.11.7, jax 0.10.2, commit 90e4ef8.")


def test_the_plot_has_a_panel_per_kind_of_column_and_one_of_training():
    recall, noise, training = panels(choose_rates(RESULTS), COLUMNS)
    assert isinstance(recall, Lines) and [line.label for line in recall.lines] == ["t", "m"]
    np.testing.assert_allclose([line.y for line in recall.lines], [[85, 75], [50, 40]])
    np.testing.assert_allclose(recall.lines[0].band, [[80, 70], [90, 80]])
    assert isinstance(noise, Rows)
    assert [row.label for row in noise.rows] == ["t 65.0 ± 7.1", "m 30.0 ± 14.1"]
    np.testing.assert_allclose(training.lines[0].y, [10, 85])
    assert "t 85.0" in render_plot(choose_rates(RESULTS), COLUMNS)


def test_a_mixer_without_all_columns_of_a_panel_is_left_out_of_it():
    partly = dataclasses.replace(RESULTS[-2], test={"noise, 3 symbols": 0.25})
    recall, noise, _ = panels(choose_rates([RESULTS[0], partly]), COLUMNS)
    assert [line.label for line in recall.lines] == ["t"]
    assert [row.label for row in noise.rows] == ["t 60.0", "m 25.0"]


def test_a_mixer_has_one_colour_in_all_panels():
    partly = dataclasses.replace(RESULTS[0], test={"noise, 3 symbols": 0.25})
    recall, noise, training = panels(choose_rates([partly, RESULTS[-2]]), COLUMNS)
    assert [line.ink for line in recall.lines] == [1]
    assert [each.ink for each in noise.rows] == [each.ink for each in training.lines] == [0, 1]


def test_a_run_without_a_call_that_was_finite_has_no_curve():
    diverged = dataclasses.replace(_result("m", 0, 1e-3, 0.0, 0.0), curve=[], diverged_at=2)
    assert "in training" in render_plot(choose_rates([diverged, RESULTS[0]]), COLUMNS)
    assert "in training" not in render_plot(choose_rates([diverged]), COLUMNS)
