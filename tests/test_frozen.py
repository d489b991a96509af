"""Runs, weights and results of an earlier version are read as before, and give the numbers that it gave.

tests/data/frozen/README.md says how each file was made.
"""
import json
import platform
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import RunConfig
from experiments.config.files import load_config
from experiments.errors import UsageError
from experiments.tasks import __main__ as tasks
from experiments.training.losses import apply_model, next_token_nats, target_mask
from hnet import HNetLM
from tests.support.assertions import FROZEN_FIRST_LOSS, FROZEN_LOSS
from tests.support.runs import REPOSITORY, batches_of, finish, results, saved_steps, start

FROZEN = REPOSITORY / "tests" / "data" / "frozen"
QUICKSTART_LOSSES = np.array(json.loads((FROZEN / "quickstart_losses.json").read_text()))
CONFIG = """
from pathlib import Path
from experiments.config import RunConfig
from experiments.config.files import config_from_json

def get_config():
    return config_from_json(Path("{config}").read_text(), RunConfig)
"""

# The text of the quick start is that of the Python which runs it.
same_python = pytest.mark.skipif(
    platform.python_version() != json.loads((FROZEN / "run" / "manifest.json").read_text())["versions"]["python"],
    reason="another Python's standard library is another corpus")


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Stdout and stderr of every command on a copy of the frozen run, with the copy's path in "workdir"."""
    directory = tmp_path_factory.mktemp("frozen")
    read, resumed = directory / "read", directory / "resumed"
    for workdir in (read, resumed):
        shutil.copytree(FROZEN / "run", workdir)
    (directory / "frozen.py").write_text(CONFIG.format(config=FROZEN / "run" / "config.json"))
    cache_dir = f"--config.data.cache_dir={directory / 'corpora'}"
    at_step_5 = (f"--workdir={read}", "--step=5", cache_dir)
    processes = {
        "evaluate": start("evaluate", *at_step_5, cache=directory, quick=False),
        "generate": start("generate", *at_step_5, "--prompt", "the model ", "--temperature=0", "--length=40",
                          cache=directory, quick=False),
        "export": start("export_weights", "hnet", *at_step_5, directory / "weights.npz", cache=directory,
                        quick=False),
        "train": start("train", f"--config={directory / 'frozen.py'}", f"--workdir={resumed}", cache_dir,
                       cache=directory, quick=False),
    }
    return {name: finish(process) for name, process in processes.items()} | {"directory": (str(directory), "")}


def test_a_run_evaluates_to_the_same_numbers(said):
    lines = said["evaluate"][0].splitlines()[-4:]
    assert "\n".join(lines) + "\n" == (FROZEN / "evaluate_step5.txt").read_text()


def test_a_run_generates_the_same_text(said):
    assert said["generate"][0] == (FROZEN / "generate_step5.txt").read_text()


def test_a_run_exports_the_same_weights(said):
    weights = Path(said["directory"][0]) / "weights.npz"
    with np.load(weights) as actual, np.load(FROZEN / "frozen_weights.npz") as expected:
        assert sorted(actual.files) == sorted(expected.files)
        for name in expected.files:
            np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
    written, frozen = (json.loads(path.read_text()) for path in (
        weights.with_suffix(".json"), FROZEN / "frozen_weights.json"))
    assert written == frozen


def test_a_run_is_resumed_under_its_config_and_ends_with_the_same_metrics(said):
    stdout, stderr = said["train"]
    workdir = Path(said["directory"][0]) / "resumed"
    assert "resuming at step 5" in stdout and saved_steps(workdir) == [5, 10]
    changed = re.findall(r"config\.([\w.]+) was", stderr)
    assert changed == ["data.cache_dir"], "the fields of the old format are those of today"
    for actual, expected in zip(results(workdir), results(FROZEN / "run"), strict=True):
        assert actual.keys() == expected.keys() and actual["step"] == expected["step"]
        rtol = FROZEN_FIRST_LOSS if actual["step"] <= 6 else FROZEN_LOSS
        for name in {"train/loss_nats", "eval/bits_per_byte"} & actual.keys():
            np.testing.assert_allclose(actual[name], expected[name], rtol=rtol, err_msg=f"{name} {actual['step']}")


def test_results_of_a_task_are_read_and_not_trained_again(tmp_path, capsys):
    outdir = tmp_path / "tasks"
    shutil.copytree(FROZEN / "tasks", outdir)
    arguments = ["--config=mqar_tiny", "--mixers=t1,m1", "--config.num_steps=40", f"--outdir={outdir}"]
    assert tasks.main([*arguments, "--config.stack.width=32"]) == 0
    assert "all runs were finished before" in capsys.readouterr().out
    assert json.loads((outdir / "results.json").read_text()) == json.loads(
        (FROZEN / "tasks" / "results.json").read_text())
    with pytest.raises(UsageError, match=r"was made with config\.stack\.width 32, and this command asks for 64"):
        tasks.main(arguments)


@same_python
@pytest.mark.slow
def test_the_quick_start_begins_with_the_same_loss():
    config = load_config("quickstart", [], RunConfig)
    batch = jax.tree.map(jnp.asarray, batches_of(config)[0])
    model = HNetLM(config.model)

    @jax.jit
    def loss(key):
        params = model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        output = apply_model(model, params, batch)
        ratio = output.stages["stage0"].ratio_loss(config.tokens_per_chunk[0])
        return next_token_nats(output.logits, batch) / target_mask(batch).sum() + config.ratio_loss_weight * ratio

    np.testing.assert_allclose(loss(jax.random.key(config.seed)), QUICKSTART_LOSSES[0], rtol=FROZEN_FIRST_LOSS)


@same_python
@pytest.mark.slow
def test_the_quick_start_learns_as_before(tmp_path):
    # The command itself: in this process, with its eight devices, programs round otherwise.
    num_steps = len(QUICKSTART_LOSSES)
    finish(start(
        "train", "--config=quickstart", f"--workdir={tmp_path / 'run'}", f"--config.num_steps={num_steps}",
        "--config.optimizer.decay_fraction=0", "--config.log_every=1", "--config.report=false",
        cache=tmp_path, quick=False))
    losses = np.array([values["train/loss_nats"] for values in results(tmp_path / "run")
                       if "train/loss_nats" in values])
    np.testing.assert_allclose(losses[0], QUICKSTART_LOSSES[0], rtol=FROZEN_FIRST_LOSS)
    np.testing.assert_allclose(losses, QUICKSTART_LOSSES, rtol=FROZEN_LOSS)
