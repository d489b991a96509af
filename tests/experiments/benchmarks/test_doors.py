"""The depth of a layer's arithmetic; in a process of its own, as functions traced before are not called again."""
import subprocess
import sys
from pathlib import Path

MOST_DOORS = 8


def test_a_mamba_layer_reaches_the_first_matmul_of_its_scan_through_few_functions():
    command = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.doors"], capture_output=True, text=True, check=True,
        cwd=Path(__file__).resolve().parents[3])
    doors = {}
    for line in command.stdout.splitlines():
        name, frames = line[:24].strip(), line[29:].split(" > ")
        assert int(line[24:27]) == len(frames) and frames[0] == "ssd_scan", line
        doors[name] = frames
    assert {"auto", "auto with gradient", "chunkwise"} < doors.keys()
    for name, frames in doors.items():
        # In Triton, the loop over chunks is one more: it is inside the kernel.
        assert len(frames) <= MOST_DOORS + name.startswith("pallas_gpu"), f"{name}: {frames}"
