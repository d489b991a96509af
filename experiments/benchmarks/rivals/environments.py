"""Environments of rivals, one for every family of packages that fit into one.

A family's environment is .venv-rivals-FAMILY beside the code, or whichever interpreter the caller names. Nothing
of ours is installed there.
"""
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.errors import RunError, UsageError, suggest
from experiments.runs.manifest import REPOSITORY

# Kept equal to the extra "rivals" of pyproject.toml by a test.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "transformers": ("torch>=2.6", "transformers>=5"),
}


def parse_interpreters(texts: Sequence[str]) -> dict[str, Path]:
    """Reads "FAMILY=PATH" of the command line into paths by family.

    Raises:
      UsageError: there is no such family or no such file.
    """
    interpreters = {}
    for text in texts:
        family, _, path = text.partition("=")
        if family not in FAMILIES or not path:
            raise UsageError(f"--python={text} must be FAMILY=PATH with a family among {', '.join(FAMILIES)}"
                             f"{suggest(family, FAMILIES)}")
        if not os.access(Path(path).expanduser(), os.X_OK):
            raise UsageError(f"--python={text}: {path} is not a program, such as venv/bin/python")
        interpreters[family] = Path(path).expanduser().absolute()
    return interpreters


def find_interpreter(family: str, given: Mapping[str, Path], *, install: bool = False) -> Path | None:
    """Returns the interpreter of a family: the given one, or that of its environment; None if there is neither.

    Args:
      install: make the environment where there is none, which downloads packages.
    Raises:
      RunError: it could not be made.
    """
    if family in given:
        return given[family]
    environment = REPOSITORY / f".venv-rivals-{family}"
    interpreter = environment / "bin" / "python"
    if not interpreter.exists() and install:
        _run(sys.executable, "-m", "venv", str(environment))
        _run(str(interpreter), "-m", "pip", "install", "--quiet", *FAMILIES[family])
    return interpreter if interpreter.exists() else None


def how_to_install(family: str) -> str:
    """Says how to get the environment of a family."""
    return f"--install makes .venv-rivals-{family}, or --python={family}=PATH names an interpreter that has it"


def _run(*command: str) -> None:
    print(" ".join(command), file=sys.stderr)
    if subprocess.run(command, check=False).returncode:
        raise RunError(f"{' '.join(command)} failed; its output is above")
