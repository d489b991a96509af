import json
import os
import shlex
import subprocess
import sys

import pytest

from experiments.errors import UsageError
from experiments.runs import manifest
from experiments.runs.manifest import prepare_workdir, update_manifest, write_manifest


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git checkout with one commit, in the place of this one."""
    path = tmp_path.resolve() / "checkout"
    path.mkdir()
    monkeypatch.setattr(manifest, "REPOSITORY", path)
    git(path, "init", "-q")
    (path / "code.py").write_text("x = 1\n")
    git(path, "add", ".")
    git(path, "-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-q", "-m", "first")
    return path


def git(path, *arguments):
    subprocess.run(["git", *arguments], cwd=path, check=True)


def on_disk(workdir):
    return json.loads((workdir / "manifest.json").read_text())


def test_the_manifest_names_command_versions_devices_and_extra_facts(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setenv("JAX_LOG_COMPILES", "0")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    written = write_manifest(tmp_path, seed=3, num_params=460_000)
    assert written == on_disk(tmp_path)
    assert written["seed"] == 3 and written["num_params"] == 460_000
    assert written["environment"]["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"
    assert "JAX_LOG_COMPILES" in written["environment"] and "hidden" not in json.dumps(written)
    assert "not installed" not in (written["versions"]["jax"], written["versions"]["orbax-checkpoint"])
    assert written["device_count"] >= 1 and written["command"] == shlex.join(sys.orig_argv)
    assert written["start_time"].endswith("+00:00")


def test_each_restart_is_added_and_the_first_start_time_stays(tmp_path, monkeypatch):
    times = iter(["2030-01-01T00:00:00+00:00", "2030-01-02T00:00:00+00:00"])
    monkeypatch.setattr(manifest, "_now", times.__next__)
    write_manifest(tmp_path, seed=3)
    update_manifest(tmp_path, status="finished")
    written = write_manifest(tmp_path, step=120, seed=3)
    assert [(start["time"][:10], start["step"]) for start in written["restarts"]] == [
        ("2030-01-01", 0),
        ("2030-01-02", 120),
    ]
    assert written["start_time"].startswith("2030-01-01")
    assert "status" not in on_disk(tmp_path)  # a run that goes on is not finished


def test_updating_keeps_everything_else(tmp_path):
    before = write_manifest(tmp_path)
    update_manifest(tmp_path, status="finished")
    assert on_disk(tmp_path) == before | {"status": "finished"}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_dirty_tree_is_told_from_a_clean_one_and_from_another_dirty_one(tmp_path, repository):
    clean = write_manifest(tmp_path)["git"]
    assert len(clean["commit"]) == 40 and not clean["is_dirty"] and clean["diff_sha256"] == ""
    hashes = set()
    for text in ("x = 2\n", "x = 3\n"):
        (repository / "code.py").write_text(text)
        dirty = write_manifest(tmp_path)["git"]
        assert dirty["commit"] == clean["commit"] and dirty["is_dirty"]
        hashes.add(dirty["diff_sha256"])
    assert len(hashes) == 2 and "" not in hashes


def test_a_copy_inside_another_checkout_does_not_borrow_its_commit(tmp_path, repository, monkeypatch):
    copy = repository / "copy"
    copy.mkdir()
    monkeypatch.setattr(manifest, "REPOSITORY", copy)
    assert write_manifest(tmp_path)["git"] == {"commit": "not a git checkout"}


def test_no_git_at_all_is_no_reason_to_fail(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert write_manifest(tmp_path)["git"] == {"commit": "not a git checkout"}


def test_a_kill_while_writing_leaves_the_previous_manifest(tmp_path, monkeypatch):
    before = write_manifest(tmp_path)

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(tmp_path, step=5)
    assert on_disk(tmp_path) == before


def test_a_manifest_that_is_not_json_is_refused_by_path(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match=r"manifest\.json is not JSON"):
        write_manifest(tmp_path)


def test_a_workdir_is_made_with_its_parents_or_refused(tmp_path):
    assert prepare_workdir(tmp_path / "runs" / "smoke").is_dir()
    assert prepare_workdir(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run", "/proc"):
        with pytest.raises(UsageError, match=r"--workdir=.*cannot write there \("):
            prepare_workdir(bad)
