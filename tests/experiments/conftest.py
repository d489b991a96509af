"""One trained run for all tests of the commands, and a compilation cache apart from the user's."""
from pathlib import Path

import jax
import pytest

from tests.support import runs


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory) -> Path:
    """A directory of compiled programs, shared by this process and those it starts."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def shared_compilation_cache(compilation_cache):
    """Lets tests reuse the programs that others compiled."""
    jax.config.update("jax_compilation_cache_dir", str(compilation_cache))


@pytest.fixture(scope="session")
def configs(tmp_path_factory) -> Path:
    """A directory with tiny.py, isotropic.py, two_stage.py and the corpus that they name."""
    directory = tmp_path_factory.mktemp("configs")
    runs.write_corpus(directory)
    texts = {"tiny": runs.CONFIG, "isotropic": runs.ISOTROPIC_CONFIG, "two_stage": runs.TWO_STAGE_CONFIG}
    for name, text in texts.items():
        (directory / f"{name}.py").write_text(text.format(directory=directory, num_steps=runs.NUM_STEPS))
    return directory


@pytest.fixture(scope="session")
def tiny(configs) -> Path:
    return configs / "tiny.py"


@pytest.fixture(scope="session")
def finished_run(tiny, tmp_path_factory, compilation_cache) -> Path:
    """The workdir of tiny.py, trained without interruption by one process; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    runs.finish(runs.start("train", f"--config={tiny}", f"--workdir={workdir}", cache=compilation_cache))
    return workdir
