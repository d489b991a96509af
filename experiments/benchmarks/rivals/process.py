"""A rival in a process of its own, which is called by lines of JSON and answers with lines of JSON."""
import base64
import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from experiments.errors import RunError

SCRIPTS = Path(__file__).parent / "scripts"


class NotInstalledError(Exception):
    """A package that the rival needs is not in its environment."""


class RivalProcess:
    """A script that runs in a rival's interpreter, from `with` to the end of its block.

      with RivalProcess("transformers_llama", interpreter, threads=2) as rival:
          rival.call("load", path=...)["seconds"]

    It inherits the cores that this process may use, and is told to use as many threads.

    Attributes:
      versions: of Python and of the packages that matter, by name.
    """

    def __init__(self, script: str | Path, interpreter: Path | str, *, threads: int) -> None:
        """Starts the script, a name in scripts/ or a path.

        Raises:
          NotInstalledError: it says that a package is missing.
          RunError: it does not start.
        """
        path = script if isinstance(script, Path) else SCRIPTS / f"{script}.py"
        self.name = path.stem
        self._errors = tempfile.TemporaryFile()
        count = str(threads)
        environment = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "RIVAL_THREADS": count,
                       "PYTHONPATH": str(SCRIPTS), "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [str(interpreter), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=os.environ | environment, text=True)
        try:
            greeting = self._receive()
        except BaseException:
            self.close()
            raise
        if "missing" in greeting:
            self.close()
            raise NotInstalledError(greeting["missing"])
        self.versions: dict[str, str] = greeting["versions"]

    def call(self, function: str, **arguments: Any) -> dict[str, Any]:
        """Calls a function of the script with plain values, and returns what it answers; arrays come as numpy's.

        Raises:
          RunError: it failed.
        """
        try:
            self._process.stdin.write(json.dumps({"call": function, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _receive says why
        answer = self._receive()
        if "error" in answer:
            raise RunError(f"{self.name}.{function} failed: {answer['error']}")
        return {name: _array(value) if isinstance(value, dict) else value for name, value in answer.items()}

    def close(self) -> None:
        """Ends the process: the end of its input tells it to."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            self._process.wait(timeout=10)
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()[-5:]
            raise RunError(f"rival {self.name} ended with code {self._process.returncode} in place of an answer"
                           f"{': ' if said else ''}{' | '.join(said)}") from None


def _array(value: dict[str, Any]) -> np.ndarray:
    """Reads an array as scripts/serve.py writes it."""
    return np.frombuffer(base64.b64decode(value["base64"]), value["dtype"]).reshape(value["shape"])
