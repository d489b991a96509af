import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.errors import UsageError
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.checksums import array_checksums

# Coroutines that orbax abandons at a damaged step die noisily, whenever they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array


def make_state(seed: int = 0, width: int = 7, dtype: Any = jnp.float32) -> State:
    params = {
        "kernel": jax.random.normal(jax.random.key(seed), (300, width), dtype),
        "half": jnp.arange(5, dtype=jnp.bfloat16) + seed,
        "mask": jnp.array([True, False]),
        "bytes": jnp.arange(3, dtype=jnp.uint8),
    }
    opt_state = optax.adam(1e-3).init({"kernel": params["kernel"]})
    return State(jnp.int32(seed), params, opt_state, jax.random.key(seed))


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def same(a: State, b: State) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return array_checksums(a) == array_checksums(b)


@pytest.fixture
def directory(tmp_path) -> Path:
    """A run with checkpoints 1 and 2, whose states are make_state(1) and make_state(2)."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2):
        assert checkpoints.save(step, make_state(step), {"data": {"step": step}})
    checkpoints.close()
    return tmp_path / "checkpoints"


def test_state_and_meta_come_back_as_they_were(directory):
    restored = Checkpoints(directory, keep=3).restore_latest(abstract(make_state()))
    assert restored.step == 2 and restored.meta == {"data": {"step": 2}}
    assert isinstance(restored.state, State) and same(restored.state, make_state(2))
    assert restored.state.params["half"].dtype == jnp.bfloat16


def test_a_named_step_comes_back_and_a_missing_one_is_refused(directory):
    checkpoints = Checkpoints(directory, keep=3)
    assert same(checkpoints.restore_step(1, abstract(make_state())).state, make_state(1))
    assert checkpoints.read_record(1).meta == {"data": {"step": 1}}
    assert checkpoints.read_record().meta == {"data": {"step": 2}}
    with pytest.raises(UsageError, match=r"no checkpoint 3 .*; steps there: 1, 2"):
        checkpoints.restore_step(3, abstract(make_state()))


def test_without_checkpoints_there_is_nothing_to_restore_and_nothing_is_made(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", keep=1)
    assert checkpoints.restore_latest(abstract(make_state())) is None
    assert checkpoints.latest_step() is None
    with pytest.raises(UsageError, match=r"no checkpoint in .*none"):
        checkpoints.read_record()
    assert not (tmp_path / "none").exists()


def test_the_newest_are_kept_and_a_step_already_there_is_left_alone(directory):
    checkpoints = Checkpoints(directory, keep=2)
    assert checkpoints.save(3, make_state(3), {})
    assert not checkpoints.save(3, make_state(4), {"other": 1})
    checkpoints.wait()
    assert checkpoints.latest_step() == 3
    assert sorted(path.name for path in directory.iterdir()) == ["2", "3"]
    assert same(checkpoints.restore_latest(abstract(make_state())).state, make_state(3))


def test_saving_a_step_below_the_newest_is_not_skipped(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.save(5, make_state(5), {}) and checkpoints.save(4, make_state(4), {})
    checkpoints.wait()
    assert same(checkpoints.restore_step(4, abstract(make_state())).state, make_state(4))


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = {"w": jnp.arange(1_000_000, dtype=jnp.float32)}
    expected = array_checksums(state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    target = abstract(state)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = overwrite(state)
    checkpoints.wait()
    assert array_checksums(checkpoints.restore_step(1, target).state) == expected


def empty_directory(step):
    shutil.rmtree(step)
    step.mkdir()


def remove_manifest(step):
    (step / "state" / "manifest.ocdbt").unlink()


def truncate_data(step):
    for path in (step / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_byte_of_meta(step):
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize("damage", [empty_directory, remove_manifest, truncate_data, flip_byte_of_meta])
def test_a_damaged_step_is_passed_over_with_one_warning(directory, damage, caplog, capfd):
    damage(directory / "2")
    checkpoints = Checkpoints(directory, keep=3)
    restored = checkpoints.restore_latest(abstract(make_state()))
    assert restored.step == 1 and same(restored.state, make_state(1))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("checkpoint 2 is damaged: ") and warning.endswith("; using 1 instead")
    assert "Traceback" not in capfd.readouterr().err
    assert checkpoints.latest_step() == 1
    with pytest.raises(UsageError, match=r"checkpoint 2 in .* is damaged"):
        checkpoints.restore_step(2, abstract(make_state()))


def test_a_flipped_bit_in_the_arrays_is_never_restored(directory, caplog):
    """Some flips orbax cannot read; others it returns as wrong numbers, which only the checksum tells."""
    dice = random.Random(0)
    target = abstract(make_state())
    path = max((directory / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    for place in dice.sample(range(len(content)), k=12):
        flipped = bytearray(content)
        flipped[place] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped)
        restored = Checkpoints(directory, keep=3).restore_latest(target)
        assert same(restored.state, make_state(restored.step)), f"bit in byte {place} of {path}"
    assert "checkpoint 2 is damaged: the checksum of params/kernel differs" in caplog.text


def test_a_damaged_step_is_set_aside_by_the_next_save_and_not_by_readers(directory):
    for repeat in ("2.damaged", "2.damaged2"):
        empty_directory(directory / "2")
        checkpoints = Checkpoints(directory, keep=3)
        checkpoints.restore_latest(abstract(make_state()))
        assert not (directory / repeat).exists()
        assert checkpoints.save(2, make_state(9), {})
        checkpoints.close()
        assert (directory / repeat).is_dir()
    again = Checkpoints(directory, keep=3)
    assert same(again.restore_latest(abstract(make_state())).state, make_state(9))


def test_if_every_step_is_damaged_the_run_does_not_start_from_nothing(directory):
    for step in ("1", "2"):
        remove_manifest(directory / step)
    checkpoints = Checkpoints(directory, keep=3)
    with pytest.raises(UsageError, match=r"every checkpoint in .* is damaged \(1: .*; 2: ") as refusal:
        checkpoints.restore_latest(abstract(make_state()))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (make_state(width=9), "params/kernel is float32[300, 7] there and float32[300, 9] here (and 2 more"),
        (make_state(dtype=jnp.bfloat16), "params/kernel is float32[300, 7] there and bfloat16[300, 7] here"),
        (make_state().replace(rng=None), "rng is key<fry>[] there and absent here; use another --workdir"),
        (make_state().replace(opt_state={"new": jnp.ones(2)}), "opt_state/new is absent there and float32"),
    ],
)
def test_a_state_that_does_not_fit_the_config_is_refused_at_once(directory, wanted, message):
    with pytest.raises(UsageError, match=r"checkpoint 2 in .* does not fit this config: ") as refusal:
        Checkpoints(directory, keep=3).restore_latest(abstract(wanted))
    assert message in str(refusal.value)


def test_a_kill_during_a_save_leaves_the_step_before_it(tmp_path):
    """The child kills itself while the writing thread has 32 MB to go."""
    script = """
        import glob, os, signal, sys
        import jax, jax.numpy as jnp
        from experiments.runs.checkpoints import Checkpoints
        checkpoints = Checkpoints(sys.argv[1], keep=3)
        checkpoints.save(1, {"w": jnp.arange(1000)}, {"data_step": 1})
        checkpoints.wait()
        noise = {"w": jax.random.normal(jax.random.key(0), (8_000_000,))}
        checkpoints.save(2, noise, {"data_step": 2})
        while not glob.glob(sys.argv[1] + "/2*"):  # a thread begins to write, some time
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_python(script, tmp_path) == -signal.SIGKILL
    assert any(path.name.startswith("2.") for path in tmp_path.iterdir()), "the save had begun"

    state = {"w": jnp.arange(1000)}
    checkpoints = Checkpoints(tmp_path, keep=3)
    restored = checkpoints.restore_latest(abstract(state))
    assert restored.step == 1 and restored.meta == {"data_step": 1} and same(restored.state, state)
    assert checkpoints.save(2, state, {})
    checkpoints.wait()
    assert Checkpoints(tmp_path, keep=3).restore_latest(abstract(state)).step == 2


def test_a_state_saved_on_one_mesh_is_restored_onto_another(tmp_path):
    script = """
        import sys
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        from experiments.runs.checkpoints import Checkpoints
        from experiments.runs.checksums import array_checksums

        def on_mesh(shape, spec):
            return NamedSharding(jax.make_mesh(shape, ("data", "model")), spec)

        value = jax.random.normal(jax.random.key(0), (8, 12)).astype(jnp.bfloat16)
        saved = {"w": jax.device_put(value, on_mesh((2, 2), P("data", "model")))}
        assert array_checksums(saved) == array_checksums({"w": value})
        checkpoints = Checkpoints(sys.argv[1], keep=3)
        checkpoints.save(1, saved, {})
        checkpoints.wait()
        for sharding in (on_mesh((4, 1), P("data")), on_mesh((1, 2), P(None, "model")), None):
            target = {"w": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)}
            restored = checkpoints.restore_latest(target).state["w"]
            assert (jax.device_get(restored) == jax.device_get(value)).all()
            assert len(restored.devices()) == (len(sharding.device_set) if sharding else 1)
    """
    assert run_python(script, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=4") == 0


def test_a_part_is_restored_alone(directory):
    checkpoints, wanted = Checkpoints(directory, keep=3), abstract(make_state()).params
    assert checkpoints.read_record().arrays["params/kernel"] == "float32[300, 7]"
    read = checkpoints.restore_latest(wanted, part="params"), checkpoints.restore_step(2, wanted, part="params")
    for part in read:
        assert part.step == 2 and part.meta == {"data": {"step": 2}}
        assert array_checksums(part.state) == array_checksums(make_state(2).params)
    assert same(checkpoints.restore_latest(abstract(make_state())).state, make_state(2))  # and then the whole
    with pytest.raises(UsageError, match=r"params/kernel is float32\[300, 7\] there and float32\[300, 8\] here"):
        checkpoints.restore_latest(abstract(make_state(width=8)).params, part="params")


def test_saves_on_a_mesh_follow_one_another_without_a_deadlock(tmp_path):
    """Programs of several arrays that are in flight at once wait for one another's threads."""
    script = """
        import sys
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        from experiments.runs.checkpoints import Checkpoints

        mesh = jax.make_mesh((2, 2), ("data", "model"))
        state = {f"w{i}": jax.device_put(jnp.ones((8 + 2 * (i % 3), 16)), NamedSharding(mesh, P(None, "model")))
                 for i in range(120)}
        checkpoints = Checkpoints(sys.argv[1], keep=2)
        for step in range(1, 7):
            checkpoints.save(step, state, {})
        checkpoints.close()
    """
    assert run_python(script, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=4") == 0
    assert (tmp_path / "6").is_dir()


def run_python(script: str, directory: Path, **environment: str) -> int:
    repository = Path(__file__).resolve().parents[3]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(directory)],
        cwd=repository,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        timeout=60,
    ).returncode


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "bool", "uint8"])
def test_a_checksum_tells_changed_and_moved_values(dtype):
    x = np.array([[1, 0, 3], [1, 0, 0]]).astype(dtype)
    changed = x.copy()
    changed[1, 2] = 1
    plain, weighted = array_checksums({"x": jnp.asarray(x)})["x"]
    assert array_checksums({"x": jnp.asarray(changed)})["x"][0] != plain
    for moved in (x[:, ::-1], x[::-1]):
        moved_plain, moved_weighted = array_checksums({"x": jnp.asarray(moved)})["x"]
        assert moved_plain == plain and moved_weighted != weighted


def test_a_checksum_sees_the_sign_of_zero_and_works_on_scalars_and_keys():
    zeros = array_checksums({"a": jnp.float32(0.0), "b": jnp.float32(-0.0)})
    assert zeros["a"] != zeros["b"] and zeros["b"] == [1 << 31, 1 << 31]
    keys = array_checksums({"a": jax.random.key(0), "b": jax.random.key(1)})
    assert keys["a"] != keys["b"]
