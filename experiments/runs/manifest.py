"""manifest.json: the code, versions and devices that made a run, to be known a year later."""
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from experiments.errors import UsageError
from experiments.files import write_whole

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "hnet-jax")


def prepare_workdir(path: Path | str) -> Path:
    """Makes the directory of a run and returns its absolute path; raises UsageError if it is not writable."""
    workdir = Path(path).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):  # permission bits alone say little, least of all to root
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--workdir={path}: cannot write there ({reason}); name another place") from error
    return workdir


def write_manifest(workdir: Path, *, step: int = 0, **extra: Any) -> dict[str, Any]:
    """Writes workdir/manifest.json at the start of a run, and again at each restart.

    The facts are those of the latest start; "restarts" lists every start, the first included, and
    "start_time" stays that of the first. Fields that `update_manifest` added
    are dropped, for the run has not ended after all.

    Args:
      step: the step that this start continues from.
      extra: further entries, as JSON values.
    """
    starts = _read(workdir).get("restarts", [])
    git = git_state()
    command = shlex.join(sys.orig_argv)
    starts.append({"time": _now(), "step": step, "command": command, "git_commit": git["commit"]})
    manifest = {
        "command": command,
        "start_time": starts[0]["time"],
        "git": git,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "environment": _relevant_environment(),
        **extra,
        "restarts": starts,
    }
    _write(workdir, manifest)
    return manifest


def update_manifest(workdir: Path, **fields: Any) -> dict[str, Any]:
    """Sets `fields` in the manifest that `write_manifest` wrote, as at the end of a run."""
    manifest = _read(workdir) | fields
    _write(workdir, manifest)
    return manifest


def _read(workdir: Path) -> dict[str, Any]:
    path = Path(workdir) / "manifest.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}); move it away, or use another --workdir") from error


def _write(workdir: Path, manifest: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        write_whole(Path(workdir) / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def git_state() -> dict[str, Any]:
    """Returns the commit, whether files differ from it, and a hash of how the tracked ones differ."""
    # A copy without .git inside some other checkout must not borrow that one's commit.
    if _git("rev-parse", "--show-toplevel") != str(REPOSITORY):
        return {"commit": "not a git checkout"}
    status = _git("status", "--porcelain")
    diff = _git("diff", "HEAD") or ""
    return {
        "commit": _git("rev-parse", "--verify", "HEAD") or "no commit yet",
        "is_dirty": bool(status),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else "",
    }


def _git(*arguments: str) -> str | None:
    """Returns what a git command prints, or None if it fails or there is no git."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _relevant_environment() -> dict[str, str]:
    names = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    return {name: v for name, v in sorted(os.environ.items()) if name in names or name.startswith("JAX_")}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
