"""Times compiled functions against each other in one process, and writes results with device and versions."""
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.pages.tables import aligned
from experiments.runs.manifest import git_state


def interleaved_seconds(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int
) -> dict[str, float]:
    """Returns the median seconds of each function, after one call to compile.

    The functions take turns, so a machine that slows down affects all of them.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def write_results(name: str, rows: list[dict[str, Any]], directory: Path, **facts: Any) -> Path:
    """Writes rows, facts, device, versions and commit to directory/<name>_<device>.json, and prints the rows."""
    device = jax.devices()[0]
    kind = device.device_kind.replace(" ", "_").lower()
    path = directory / f"{name}_{kind}.json"
    directory.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name, "device": device.device_kind, "device_count": jax.device_count(),
        "machine": platform.machine(), "jax": jax.__version__, "python": platform.python_version(),
        "commit": git_state()["commit"], **facts, "rows": rows,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    columns = list(rows[0])
    table = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    print("\n".join([*aligned(table, left=()), str(path)]))
    return path


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
