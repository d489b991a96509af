"""One way into a run: its config with overrides, its weights alone, and weights for another model."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config.files import saved_fields
from experiments.errors import UsageError
from experiments.runs import saved_run
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.saved_run import SavedRun, start_or_resume
from experiments.training.mesh import make_mesh, use_mesh
from experiments.training.step import TrainState, compile_program
from hnet import parameter_shapes
from tests.support.runs import config_of


def _filled(shapes, value: float):
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), shapes)


@pytest.fixture
def run(configs, tmp_path):
    """A run of isotropic.py with checkpoints 1 and 2, whose weights are 1 and 2, and their averages 10 and 20."""
    config = config_of(configs / "isotropic.py")
    shapes = parameter_shapes(config.model)
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            # An optimizer's state that no config here describes: readers must not look at it.
            state = TrainState(jnp.int32(step), _filled(shapes, step), (jnp.zeros(3),), _filled(shapes, 10 * step))
            checkpoints.save(step, state, {"config": saved_fields(config), "note": step})
    return config, tmp_path / "run"


def test_the_weights_of_the_newest_checkpoint_are_read_alone_and_averaged(run):
    config, workdir = run
    with SavedRun.open(workdir) as saved:
        params = saved.params()
    assert saved.config == config and saved.workdir == workdir and (saved.step, saved.meta["note"]) == (2, 2)
    assert {float(value) for leaf in jax.tree.leaves(params) for value in np.unique(leaf)} == {20.0}
    assert jax.tree.structure(params) == jax.tree.structure(parameter_shapes(config.model))


def test_a_step_and_overrides_are_taken(run):
    with SavedRun.open(run[1], step=1, overrides=["--config.eval_bytes=77"]) as saved:
        assert float(saved.params()["embedding"][0, 0]) == 10 and saved.step == 1
    assert saved.config.eval_bytes == 77
    with pytest.raises(UsageError, match=r"no checkpoint 3 .*; steps there: 1, 2"):
        SavedRun.open(run[1], step=3)


def test_a_damaged_newest_checkpoint_is_passed_over(run, caplog):
    for data in (run[1] / "checkpoints" / "2" / "state").rglob("d/*"):
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    with SavedRun.open(run[1]) as saved:
        if float(saved.params()["embedding"][0, 0]) == 20:
            pytest.skip("the byte was of arrays that are not read")
    assert saved.step == 1 and "checkpoint 2 is damaged" in caplog.text


def test_a_run_to_start_from_is_opened_once_and_its_program_never_made(run, configs, tmp_path, monkeypatch):
    config, mesh = config_of(configs / "isotropic.py", f"init_from={run[1]}"), make_mesh(1, jax.devices()[:1])
    opened = []

    class Counted(Checkpoints):
        def __init__(self, directory, *, keep):
            opened.append(directory)
            super().__init__(directory, keep=keep)

    monkeypatch.setattr(saved_run, "Checkpoints", Counted)
    with use_mesh(mesh):
        program = compile_program(config, mesh)
        state, seconds = start_or_resume(config, program, Checkpoints(tmp_path / "new", keep=1), corpus=None)
    assert opened == [run[1] / "checkpoints"] and seconds == 0
    assert float(state.params["embedding"][0, 0]) == 20 and int(state.step) == 0
