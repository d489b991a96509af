"""The loop of a rival's process. Runs in any environment: it needs the standard library alone.

One line of JSON comes per call, {"call": name, "arguments": {...}}, and one goes back: the dict that the function
returned, or {"error": text}. The first line out says which versions run, or which package is missing.
"""
import base64
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from typing import Any


def threads() -> int:
    """Returns how many threads this process was told to use."""
    return int(os.environ["RIVAL_THREADS"])


def array(x: Any) -> dict[str, Any]:
    """Writes an array, which has `dtype`, `shape` and `tobytes` as numpy's, as plain values."""
    return {"dtype": str(x.dtype), "shape": list(x.shape), "base64": base64.b64encode(x.tobytes()).decode()}


def serve(packages: Sequence[str], make: Callable[[], dict[str, Callable[..., dict[str, Any]]]]) -> None:
    """Answers calls until the input ends.

    Args:
      packages: that `make` imports; the first that is missing ends the process with a line that names it.
      make: returns the functions that may be called, by name.
    """
    # Whatever libraries print must not get between the lines.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            send({"missing": f"{package} ({error})"})
            return
    functions = make()
    send({"versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}})
    for line in sys.stdin:
        call = json.loads(line)
        try:
            send(functions[call["call"]](**call["arguments"]))
        except Exception as error:  # whatever happened, the caller is told
            send({"error": f"{type(error).__name__}: {error}"})
