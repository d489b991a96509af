"""The harness for rivals: they answer over pipes, wrong results are refused, missing packages are said."""
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import language_model
from experiments.benchmarks.rivals.contest import Turn, check_equal, contest
from experiments.benchmarks.rivals.environments import FAMILIES, find_interpreter, parse_interpreters
from experiments.benchmarks.rivals.process import NotInstalledError, RivalProcess
from experiments.errors import RunError, UsageError

REPOSITORY = Path(__file__).parents[3]
SCRIPT = """
import sys

from serve import array, serve, threads


class Numbers:  # what `array` needs of numpy's, which a rival's environment may lack
    dtype, shape = "float32", (1, 2)

    def __init__(self, values):
        import struct
        self.values = struct.pack("<2f", *values)

    def tobytes(self):
        return self.values


def make():
    total = [0]

    def add(numbers):
        print("libraries print what they like")
        total[0] += sum(numbers)
        return {{"seconds": 2.0, "cpu_seconds": 3.0, "logits": array(Numbers([total[0] + {wrong}, threads()]))}}

    def die():
        print("out of memory", file=sys.stderr)
        sys.stderr.flush()
        import os
        os._exit(9)

    return {{"add": add, "die": die}}


serve({packages}, make)
"""


def _script(directory, *, wrong=0, packages=()):
    path = directory / "fake.py"
    path.write_text(SCRIPT.format(wrong=wrong, packages=list(packages)))
    return path


def _ours():
    total = 0

    def turn():
        nonlocal total
        total += 3
        return Turn(1.0, 1.5, np.array([[total, 2]], np.float32))

    return turn


def _theirs(rival):
    def turn():
        answer = rival.call("add", numbers=[1, 2])
        return Turn(answer["seconds"], answer["cpu_seconds"], answer["logits"])

    return turn


def test_a_rival_keeps_its_state_between_calls_and_both_sides_take_turns(tmp_path):
    with RivalProcess(_script(tmp_path), sys.executable, threads=2) as rival:
        assert rival.versions["python"] == sys.version.split()[0]
        both = contest("sums", _ours(), _theirs(rival), rounds=3, tolerance=0.0)
    assert both.ours.seconds == (1.0,) * 3 and both.rival.seconds == (2.0,) * 3 and both.ratio == 0.5
    assert both.rival.cpu_seconds == (3.0,) * 3 and both.cpu_ratio == 0.5


def test_a_rival_that_answers_wrong_is_refused_and_gives_no_time(tmp_path):
    with RivalProcess(_script(tmp_path, wrong=1), sys.executable, threads=2) as rival, pytest.raises(
            RunError, match=r"sums: our result and the rival's differ by 0\.22 of its size, and 0\.1"):
        contest("sums", _ours(), _theirs(rival), rounds=3, tolerance=0.1)


def test_results_of_other_shapes_or_that_are_no_numbers_are_refused():
    check_equal("x", np.ones((2, 3)), np.ones((2, 3)), 0.0)
    with pytest.raises(RunError, match=r"shape \(2, 3\), the rival's \(3, 2\)"):
        check_equal("x", np.ones((2, 3)), np.ones((3, 2)), 1.0)
    with pytest.raises(RunError, match="differ by nan"):
        check_equal("x", np.full(3, np.nan), np.full(3, np.nan), 1.0)


def test_a_rival_that_fails_or_dies_is_reported_with_what_it_said(tmp_path):
    with RivalProcess(_script(tmp_path), sys.executable, threads=1) as rival:
        with pytest.raises(RunError, match=r"fake\.add failed: TypeError"):
            rival.call("add", numbers=["one"])
        with pytest.raises(RunError, match=r"code 9 in place of an answer: libraries print .* out of memory"):
            rival.call("die")


def test_a_package_that_is_missing_is_named(tmp_path):
    with pytest.raises(NotInstalledError, match="no_such_package"):
        RivalProcess(_script(tmp_path, packages=["no_such_package"]), sys.executable, threads=1)


def test_interpreters_are_named_by_family(tmp_path, monkeypatch):
    assert parse_interpreters([f"transformers={sys.executable}"]) == {"transformers": Path(sys.executable)}
    with pytest.raises(UsageError, match="--python=torch=/x must be FAMILY=PATH with a family among transformers"):
        parse_interpreters(["torch=/x"])
    with pytest.raises(UsageError, match="/x is not a program"):
        parse_interpreters(["transformers=/x"])
    monkeypatch.setattr("experiments.benchmarks.rivals.environments.REPOSITORY", tmp_path)
    assert find_interpreter("transformers", {}) is None
    assert find_interpreter("transformers", {"transformers": Path("/there")}) == Path("/there")


def test_the_extra_of_rivals_lists_what_their_environments_get():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert sorted(extras["rivals"]) == sorted({each for family in FAMILIES.values() for each in family})


def test_a_table_says_that_a_rival_is_not_installed():
    row = {"work": "decode", "rows": 8, "prompt": 2048, "dtype": "float32", "ratio": None, "cpu_ratio": None,
           "ours_milliseconds": 12.5, "ours_spread": [12.0, 14.0], "rival_milliseconds": None,
           "rival_spread": None}
    line = language_model.table([row]).splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "a step after 2,048 tokens", "8", "float32", "12.5 (12 to 14)", "not installed", "", ""]


@pytest.mark.parametrize(("argument", "message"), [
    ("--rows=1,0", "--rows=1,0 must be numbers, at least 1"), ("--rounds=0", "--rounds 0 must be at least"),
    ("--dtypes=int8", "--dtypes=int8 must be among float32, bfloat16"),
])
def test_the_command_refuses_what_does_not_fit_before_it_loads_a_model(argument, message):
    with pytest.raises(UsageError, match=message):
        language_model.main(["--workdir=/nowhere", argument])
