"""Experiments of many runs, (name, seed) -> result: means over seeds, origin of the numbers, files of findings."""
import dataclasses
import json
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from experiments.errors import RunError, UsageError
from experiments.files import write_whole


class Result(Protocol):
    """One finished run: a dataclass of JSON values, with the part of its manifest that tells its origin."""
    commit: str
    is_dirty: bool
    device: str
    versions: dict[str, str]


R = TypeVar("R", bound=Result)


def by_name(results: Iterable[R], name_of: Callable[[R], str]) -> dict[str, list[R]]:
    """Groups results, in the order in which they come."""
    groups: dict[str, list[R]] = {}
    for result in results:
        groups.setdefault(name_of(result), []).append(result)
    return groups


def mean_and_deviation(values: Iterable[float], *, decimals: int) -> str:
    """Writes a mean and, of more than one value, the sample standard deviation: "2.316 ± 0.019"."""
    values = [float(value) for value in values]
    if not values:
        return "not run"
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{decimals}f}{spread}"


def origin(results: Sequence[Result]) -> str:
    """Names the devices, versions and commits that results come from, each once."""
    commits = all_of(f"{each.commit[:7]}{' with changes' if each.is_dirty else ''}" for each in results)
    jax, python = (all_of(each.versions[name] for each in results) for name in ("jax", "python"))
    return f"{all_of(each.device for each in results)}, Python {python}, jax {jax}, commit {commits}."


def all_of(values: Iterable[Any]) -> str:
    """Joins the different values, sorted, by "and"."""
    return " and ".join(sorted({str(value) for value in values}))


def save_result(result: Any, outdir: Path) -> None:
    """Writes the file of a finished part: JSON values in a dataclass, whose `name` knows its path in `outdir`."""
    path = result.name.path(outdir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(dataclasses.asdict(result), indent=2) + "\n")


def refuse_another_config(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UsageError if the result in `path` was made with other settings than a command asks for.

    Args:
      before, now: settings by their names.
    """
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise UsageError(
                f"{path} was made with {name} {before.get(name)!r}, and this command asks for "
                f"{now.get(name)!r}; use another --outdir, or delete that file")


def write_findings(
    outdir: Path, finished: Mapping[Hashable, R | None], name: str, render: Callable[[list[R]], tuple[str, str]]
) -> None:
    """Writes the results of all finished runs, a table and a plot of them, and prints the table.

    Args:
      finished: the result of every run of the experiment by its name, None where it is not finished.
      name: of the file of results.
      render: returns the text of table.md and of plot.svg.
    Raises:
      RunError: no run is finished.
    """
    results = [result for result in finished.values() if result]
    if not results:
        raise RunError(
            f"--outdir={outdir}: none of the {len(finished)} runs is finished; there is nothing to draw")
    if len(results) < len(finished):
        print(f"not finished and left out: {', '.join(str(run) for run, each in finished.items() if not each)}")
    table, plot = render(results)
    records = json.dumps([dataclasses.asdict(result) for result in results], indent=2) + "\n"
    files = {name: records, "table.md": table, "plot.svg": plot}
    for file, text in files.items():
        write_whole(outdir / file, text)
    print(f"\n{table}\n{', '.join(str(outdir / file) for file in files)}", flush=True)
