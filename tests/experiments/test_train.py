import dataclasses
import json
import math
import shutil
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import evaluate, train
from experiments.errors import RunError
from experiments.runs.saved_run import SavedRun
from experiments.training import step as train_step
from experiments.training.mesh import batch_sharding, make_mesh, use_mesh
from experiments.training.step import TrainState, compile_program
from tests.support.assertions import ANOTHER_SUM_ORDER, assert_golden
from tests.support.runs import (
    KEPT_STEPS,
    NUM_STEPS,
    assert_same_training,
    batches_of,
    config_of,
    finish,
    results,
    saved_steps,
    start,
    train_here,
)

# The training command, which sends itself a signal right after the first record of a step is in metrics.jsonl.
SIGNALLED = """
import os, signal, sys
from experiments import train
from experiments.runs.metrics import MetricsWriter

number, at_step, write = int(sys.argv[1]), int(sys.argv[2]), MetricsWriter.write

def write_and_signal(self, step, metrics):
    write(self, step, metrics)
    if step == at_step and "train/loss_nats" in metrics:
        os.kill(os.getpid(), number)

MetricsWriter.write = write_and_signal
sys.exit(train.main(sys.argv[3:]))
"""


# An interrupted run, and the same command again


@pytest.fixture
def train_in_a_process(tiny, tmp_path, compilation_cache):
    """Trains tiny.py in tmp_path/run, to the end or to a signal after some step; returns stdout and stderr."""
    def run(number: int = 0, *, after_step: int = 0, code: int = 0) -> tuple[str, str]:
        arguments = f"--config={tiny}", f"--workdir={tmp_path / 'run'}"
        program = [SIGNALLED, str(int(number)), str(after_step)] if number else ["train"]
        return finish(start(*program, *arguments, cache=compilation_cache), code=code)

    return run


def test_a_killed_run_goes_on_as_if_it_had_never_stopped(finished_run, train_in_a_process, tmp_path):
    workdir = tmp_path / "run"
    train_in_a_process(signal.SIGKILL, after_step=13, code=-signal.SIGKILL)
    assert results(workdir)[-1]["step"] == 13
    resumable = max(saved_steps(workdir))
    assert resumable in (5, 10)  # the write of 10 may have been cut off

    stdout, _ = train_in_a_process()
    assert f"resuming at step {resumable}\n" in stdout
    assert results(workdir) == results(finished_run)
    assert saved_steps(workdir) == list(KEPT_STEPS)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(finished_run, train_in_a_process, tmp_path):
    """Step 8 evaluates, so the signal comes between the decisions about step 8 and those about step 9."""
    workdir = tmp_path / "run"
    stdout, _ = train_in_a_process(signal.SIGTERM, after_step=8, code=train.SIGTERM_EXIT)
    assert "stopped by SIGTERM at step 9; the same command continues from there\n" in stdout
    assert saved_steps(workdir) == [5, 9]

    stdout, _ = train_in_a_process()
    assert "resuming at step 9\n" in stdout
    assert results(workdir) == results(finished_run)


def test_a_flipped_byte_in_the_newest_checkpoint_costs_only_the_way_from_the_one_before(
    finished_run, train_in_a_process, tmp_path
):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    data = max((workdir / "checkpoints" / "20" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)

    stdout, stderr = train_in_a_process()
    (warning,) = [line for line in stderr.splitlines() if "is damaged" in line]
    assert warning.startswith("WARNING: checkpoint 20 is damaged: ") and warning.endswith("; using 15 instead")
    assert "resuming at step 15\n" in stdout
    assert results(workdir) == results(finished_run)
    assert saved_steps(workdir) == list(KEPT_STEPS)


def test_steps_and_evaluations_are_all_logged_once(finished_run):
    records = results(finished_run)
    assert [r["step"] for r in records if "train/loss_nats" in r] == list(range(1, NUM_STEPS + 1))
    assert [r["step"] for r in records if "eval/bits_per_byte" in r] == [8, 16, 20]
    assert records[-1]["eval/bits_per_byte"] < records[8]["eval/bits_per_byte"]
    assert all(math.isfinite(value) for record in records for value in record.values())


# Compilation and devices


def test_eight_devices_train_as_one_does_and_compile_once(tiny, tmp_path, monkeypatch, finished_run):
    """jax runs a Python function anew exactly when it compiles for other shapes, dtypes or shardings."""
    traced = []

    def count(function):
        def counted(*args, **kwargs):
            traced.append(function.__name__)
            return function(*args, **kwargs)
        return counted

    monkeypatch.setattr(train_step, "train_step", count(train_step.train_step))
    monkeypatch.setattr(evaluate, "next_token_nats", count(evaluate.next_token_nats))
    programs = []

    def compile_and_keep(*args):
        programs.append(compile_program(*args))
        return programs[-1]

    monkeypatch.setattr(train, "compile_program", compile_and_keep)
    assert train.main([f"--config={tiny}", f"--workdir={tmp_path}"]) == 0
    assert sorted(traced) == ["next_token_nats", "train_step"]
    assert programs[0].step._cache_size() == 1  # nor a second executable for the same trace
    assert_same_training(results(tmp_path), results(finished_run))


def test_four_by_two_devices_share_the_parameters_and_train_as_one_does(tiny, finished_run):
    mesh = make_mesh(2)
    assert mesh.shape == {"data": 4, "model": 2}
    state, metrics = train_here(config_of(tiny), mesh)
    expected = [record for record in results(finished_run) if "train/loss_nats" in record]
    assert_same_training(metrics, expected)

    (adam,) = [each for each in jax.tree.leaves(state.opt_state, is_leaf=lambda node: hasattr(node, "mu"))
               if hasattr(each, "mu")]
    for tree in (state.params, adam.mu, adam.nu):
        qkv = tree["stage0"]["encoder"]["run0"]["mixer"]["qkv"]["kernel"]
        assert {shard.data.size for shard in qkv.addressable_shards} == {qkv.size // 2}
        norm = tree["stage0"]["encoder"]["final_norm"]["scale"]
        assert {shard.data.size for shard in norm.addressable_shards} == {norm.size}


def test_the_lowered_step_constrains_activations(tiny):
    """Linen's logical constraints vanish without a word where no mesh is current."""
    config, mesh = config_of(tiny), make_mesh(1)
    program = compile_program(config, mesh)
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    with use_mesh(mesh):
        text = program.step.lower(program.abstract_state, {"tokens": tokens, "segment_ids": tokens}).as_text()
    constraints = [line for line in text.splitlines() if "sharding_constraint" in line or "@Sharding" in line]
    assert any("data" in line for line in constraints)


# Parts of a batch, and dtypes


@pytest.fixture(scope="module")
def gradients(tiny):
    """A function of (batch, ratio_loss_weight, accumulation_steps): the gradients and metrics of one step."""
    configs = {n: config_of(tiny, f"optimizer.accumulation_steps={n}") for n in (1, 2)}
    mesh = make_mesh(1, jax.devices()[:1])
    program = compile_program(configs[1], mesh)
    with use_mesh(mesh):
        params = program.init(jax.random.key(0)).params
    keep = optax.GradientTransformation(lambda params: params, lambda grads, state, params: (grads, grads))

    @partial(jax.jit, static_argnames="num_parts")
    def run(batch, weight, num_parts):
        config = dataclasses.replace(configs[num_parts], ratio_loss_weight=weight)
        state = TrainState(jnp.int32(0), params, keep.init(params))
        state, metrics = train_step.train_step(state, batch, model=program.model, config=config, optimizer=keep)
        return state.opt_state, metrics

    return lambda batch, weight, num_parts: run(batch, jnp.float32(weight), num_parts=num_parts)


@pytest.fixture
def batch(tiny):
    """Eight rows, each a segment of its own; those of the second part repeat one byte and have few boundaries."""
    tokens = batches_of(config_of(tiny))[0]["tokens"]
    tokens[1::2] = ord("a")
    return {"tokens": tokens, "segment_ids": np.ones_like(tokens)}


def test_accumulation_does_not_change_the_gradients_of_the_cross_entropy(gradients, batch):
    batch["segment_ids"][1::2, 9:] = 0  # the parts have different numbers of targets
    whole, whole_metrics = gradients(batch, 0.0, 1)
    parts, parts_metrics = gradients(batch, 0.0, 2)
    assert_golden(parts, whole, limit=ANOTHER_SUM_ORDER)
    for name in ("train/loss_nats", "train/bits_per_byte", "train/target_bytes", "train/grad_norm"):
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=ANOTHER_SUM_ORDER)


def test_with_accumulation_the_ratio_loss_is_the_mean_over_parts(gradients, batch):
    halves = [jax.tree.map(lambda z, i=i: np.concatenate([z[i::2]] * 2), batch) for i in (0, 1)]
    first, second = (gradients(half, 3.0, 1) for half in halves)
    mean, mean_metrics = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    parts, parts_metrics = gradients(batch, 3.0, 2)
    assert_golden(parts, mean, limit=ANOTHER_SUM_ORDER)
    whole_metrics = gradients(batch, 3.0, 1)[1]
    for name in ("train/loss_nats", "stage0/ratio_loss"):
        np.testing.assert_allclose(parts_metrics[name], mean_metrics[name], rtol=ANOTHER_SUM_ORDER)
        assert abs(parts_metrics[name] / whole_metrics[name] - 1) > 10 * ANOTHER_SUM_ORDER, "the two ways differ"


def test_bfloat16_learns_and_keeps_its_state_in_float32(tiny, finished_run):
    config = config_of(tiny, "model.dtype=bfloat16")
    state, metrics = train_here(config, make_mesh(1, jax.devices()[:1]))
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.opt_state))}
    assert dtypes == {"float32", "int32"}  # int32: the optimizer's count
    losses = [each["train/loss_nats"] for each in metrics]
    assert losses[-1] < losses[0] - 0.5
    in_float32 = results(finished_run)[0]["train/loss_nats"]
    assert 0 < abs(losses[0] - in_float32) < 0.01, "the activations are bfloat16, and the same function"


# What stops a run


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_step_that_breaks_the_parameters_stops_the_run_and_is_never_saved(configs, tmp_path):
    """The loss of that step is still finite: it is the loss before the update."""
    arguments = [f"--config={configs / 'isotropic.py'}", f"--workdir={tmp_path}", "--config.report=false"]
    train.main([*arguments, "--config.num_steps=4", "--config.checkpoint_every=2"])
    with pytest.raises(RunError, match=r"step 5: .*param_norm is (inf|nan); .*the last good checkpoint is 4$"):
        train.main([*arguments, "--config.num_steps=8", "--config.checkpoint_every=1",
                    "--config.optimizer.peak_lr=1e39"])
    assert saved_steps(tmp_path) == [2, 4]
    with SavedRun.open(tmp_path) as saved:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved.params()))
    assert results(tmp_path)[-1]["step"] == 4


def test_a_finished_run_has_nothing_left_to_do(finished_run, tiny, tmp_path, capsys):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    assert train.main([f"--config={tiny}", f"--workdir={workdir}"]) == 0
    assert "resuming at step 20" in capsys.readouterr().out
    assert results(workdir) == results(finished_run)
    before, after = (json.loads((each / "manifest.json").read_text()) for each in (finished_run, workdir))
    assert before["train_seconds"] == after["train_seconds"] > 0
    assert [start["step"] for start in after["restarts"]] == [0, 20]
