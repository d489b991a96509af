"""The table and the plot of a sweep show its runs, number by number."""
import numpy as np

from experiments.pages.sweep import Result, panels, render_plot, render_table, tokens_per_chunk


def _result(config: str, seed: int, bits: list[float], bytes_per_chunk: tuple[float, ...] = ()) -> Result:
    chunks = {f"eval/stage{index}/bytes_per_chunk": each for index, each in enumerate(bytes_per_chunk)}
    chunks |= {f"eval/stage{index}/boundary_rate": 1 / each for index, each in enumerate(bytes_per_chunk)}
    return Result(
        config=config, seed=seed, num_params=493_464, flops_per_byte=612_345.0, train_seconds=180.2 + seed,
        evaluations=[{"step": 100 * (index + 1), "eval/bits_per_byte": each} | chunks
                     for index, each in enumerate(bits)],
        commit="90e4ef8abc", is_dirty=config == "a_<dirty>", device="1 x cpu",
        versions={"jax": "0.10.2", "python": "3.11.7"})


RESULTS = [
    _result("a_learned", 0, [3.0, 2.0], (4.0,)), _result("a_learned", 1, [3.2, 2.2], (5.0,)),
    _result("a_<dirty>", 0, [2.9, 2.5], (2.5, 6.25)), _result("a_flat", 0, [2.5, 2.4, 2.3]),
]


def test_the_table_has_a_row_per_config_and_says_where_it_comes_from():
    header, _, *rows, empty, footnote = render_table(RESULTS).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells == [
        ["a_learned", "2", "2.100 ± 0.141", "4.50", "0.612", "493k", "181"],
        ["a_<dirty>", "1", "2.500", "2.50, 6.25", "0.612", "493k", "180"],
        ["a_flat", "1", "2.300", "no chunks", "0.612", "493k", "180"],
    ]
    assert {len(row) for row in rows} == {len(header)} and empty == ""
    assert "1 x cpu, Python 3.11.7, jax 0.10.2, commit 90e4ef8 and 90e4ef8 with changes." in footnote


def test_the_plot_has_a_line_with_a_band_and_a_row_per_config():
    lines, rows = panels(RESULTS)
    assert [line.label for line in lines.lines] == ["learned", "<dirty>", "flat"]
    assert [row.label for row in rows.rows] == ["learned 2.100 ± 0.141", "<dirty> 2.500", "flat 2.300"]
    assert [line.ink for line in lines.lines] == [row.ink for row in rows.rows] == [0, 1, 2]
    assert [row.values.tolist() for row in rows.rows] == [[2.0, 2.2], [2.5], [2.3]]
    assert render_plot(RESULTS).startswith("<?xml")


def test_a_band_reaches_from_the_lowest_to_the_highest_seed():
    [line] = panels([_result("x", seed, [3.0 + seed, 2.0]) for seed in range(3)])[0].lines
    low, high = line.band
    np.testing.assert_array_equal([low, line.y, high], [[3, 2], [4, 2], [5, 2]])
    assert line.x.tolist() == [100, 200]


def test_curves_hold_the_steps_at_which_all_seeds_were_evaluated():
    [line] = panels([_result("x", 0, [3.0, 2.0]), _result("x", 1, [3.0])])[0].lines
    assert line.x.tolist() == [100] and line.y.tolist() == [3.0]


def test_realised_compression_counts_tokens_of_each_stage():
    evaluation = {"eval/stage0/boundary_rate": 0.4, "eval/stage1/boundary_rate": 0.5, "eval/bits_per_byte": 2.0}
    assert tokens_per_chunk(evaluation) == (2.5, 2.0)
    assert tokens_per_chunk({"eval/bits_per_byte": 2.0}) == ()
