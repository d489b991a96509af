"""Additions of a recipe to the plain step: ratio objectives, schedules, masked losses, averages, overflow."""
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate, train
from experiments.config import DataConfig, OptimizerConfig, RunConfig
from experiments.config.files import saved_fields
from experiments.data import BOS
from experiments.errors import RunError, UsageError
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.saved_run import SavedRun, start_or_resume
from experiments.training import losses
from experiments.training import step as train_step
from experiments.training.losses import loss_fn, tokens_per_chunk
from experiments.training.mesh import batch_sharding, make_mesh, put_batch, use_mesh
from experiments.training.step import compile_program, weights
from experiments.training.step_problems import overflow_problem
from hnet import HNetLM, HNetOutput, StageOutput
from tests.support.runs import batches_of, config_of


@pytest.fixture
def one_device():
    return make_mesh(1, jax.devices()[:1])


# Settings that contradict each other


@pytest.mark.parametrize(("override", "message"), [
    ("optimizer.warmup_fraction=0.1", "warmup_steps 5 and optimizer.warmup_fraction 0.1 both .*; set one"),
    ("optimizer.warmup_fraction=10", "optimizer.warmup_fraction 10.0 must be from 0 to 1"),
    ("optimizer.ema_decay=1", "optimizer.ema_decay 1.0 must be from 0 to below 1"),
    ("optimizer.stage_lr_rule=papr", "'papr' is not one of equal, paper; did you mean 'paper'"),
    ("tokens_per_chunk=(1.0,)", r"tokens_per_chunk \(1.0,\) must all be above 1, except for ratio_objective 'no"),
    ("tokens_per_chunk_start=(2.0,)", "tokens_per_chunk_ramp_steps 0 make a schedule together; set both or"),
    ("tokens_per_chunk_ramp_steps=9", "tokens_per_chunk_ramp_steps 9 make a schedule together; set both or"),
    ("tokens_per_chunk_start=(2.0,2.0)", r"tokens_per_chunk_start \(2.0, 2.0\) must have one value per stage"),
    ("ratio_objective=hing", "ratio_objective 'hing' is not one of hnet, hinge, none; did you mean 'hinge'"),
    ("ratio_statistics=shard", "ratio_statistics 'shard' is not one of global, local"),
    ("max_overflow_fraction=2", "max_overflow_fraction 2.0 must be from 0 to 1"),
    ("data.loss_after=\\", r"data.loss_after '\\\\' is no text: .* is written twice"),
])
def test_a_setting_that_does_not_fit_is_refused_by_field(tiny, override, message):
    with pytest.raises(UsageError, match=message):
        config_of(tiny, override)


def test_two_ways_to_say_the_same_are_refused():
    with pytest.raises(ValueError, match=r"optimizer.stage_lr_rule 'paper' .* leave one at its default"):
        OptimizerConfig(stage_lr_rule="paper", stage_lr_multipliers=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"optimizer.final_lr_fraction 0 is never reached"):
        OptimizerConfig(schedule="wsd_inverse_sqrt", final_lr_fraction=0)


def test_without_a_ratio_objective_a_target_of_one_is_no_contradiction(tiny):
    assert config_of(tiny, "ratio_objective=none", "tokens_per_chunk=(1.0,)").tokens_per_chunk == (1.0,)


# The ratio loss, through a model whose router has decided already


B, T = 4, 6


@pytest.fixture
def decided(monkeypatch):
    """A function of (config, num_groups): the loss and metrics of rows that are all boundaries or none."""
    is_boundary = jnp.broadcast_to(jnp.arange(B)[:, None] < B // 2, (B, T))
    p = jnp.where(is_boundary, 0.9, 0.2)
    stage = StageOutput(p, is_boundary, jnp.ones((B, T), bool), jnp.array([2, 0, 0, 0]), jnp.int32(4))
    output = HNetOutput(jnp.zeros((B, T, 256)), {"stage0": stage}, None)
    monkeypatch.setattr(losses, "apply_model", lambda *_: output)

    def run(config: RunConfig, num_groups: int = 1):
        batch = {"tokens": jnp.zeros((B, T + 1), int), "segment_ids": jnp.ones((B, T + 1), int)}
        targets = tokens_per_chunk(config, jnp.int32(0))
        return loss_fn({}, batch, jnp.float32(B * T), targets, model=None, config=config, num_groups=num_groups)

    return run


def _hnet(n: float, f: float, g: float) -> float:
    return n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))


@pytest.mark.parametrize(("objective", "num_groups", "expected"), [
    ("hnet", 1, _hnet(4, 0.5, 0.55)),
    ("hnet", 2, (_hnet(4, 1.0, 0.9) + _hnet(4, 0.0, 0.2)) / 2),
    ("hinge", 1, 4 * 0.5 - 1),
    ("hinge", 2, (4 * 1.0 - 1 + 0) / 2),
    ("none", 1, 0.0),
])
def test_the_objective_is_weighted_and_logged(tiny, decided, objective, num_groups, expected):
    loss, metrics = decided(config_of(tiny, f"ratio_objective={objective}", "ratio_loss_weight=3"), num_groups)
    assert float(metrics["stage0/ratio_loss"]) == pytest.approx(expected)
    assert float(loss) == pytest.approx(np.log(256) + 3 * expected)


def test_of_parts_of_a_batch_counts_add_up_and_the_rest_is_averaged(tiny, decided):
    _, metrics = decided(config_of(tiny, "optimizer.accumulation_steps=4"))
    assert {name.removeprefix("stage0/"): float(value) for name, value in metrics.items() if "stage0" in name} == (
        pytest.approx({
            "boundaries": B * T / 2, "overflow_boundaries": 2, "overflow_rows": 1,
            "boundary_rate": 0.5 / 4, "mean_boundary_prob": 0.55 / 4, "capacity": 4 / 4,
            "bytes_per_chunk": B * T / (B * T / 2 - 2) / 4, "target_tokens_per_chunk": 4 / 4,
            "ratio_loss": _hnet(4, 0.5, 0.55) / 4}))


@pytest.mark.parametrize(("statistics", "expected"), [("local", 4), ("global", 1)])
def test_local_statistics_are_those_of_the_rows_of_each_data_shard(tiny, monkeypatch, statistics, expected):
    seen = []

    def note(*args, num_groups, **kwargs):
        seen.append(num_groups)
        return loss_fn(*args, num_groups=num_groups, **kwargs)

    monkeypatch.setattr(train_step, "loss_fn", note)
    config, mesh = config_of(tiny, f"ratio_statistics={statistics}"), make_mesh(2)
    with use_mesh(mesh):
        program = compile_program(config, mesh)
        jax.eval_shape(program.step, program.abstract_state, {
            name: jax.ShapeDtypeStruct((8, 33), jnp.int32) for name in ("tokens", "segment_ids")})
    assert seen == [expected]


def test_the_target_goes_from_low_to_high_compression_in_equal_parts(tiny):
    config = config_of(tiny, "tokens_per_chunk=(6.0,)", "tokens_per_chunk_start=(2.0,)",
                       "tokens_per_chunk_ramp_steps=8")
    targets = [float(tokens_per_chunk(config, jnp.int32(step))[0]) for step in (0, 1, 2, 8, 9, 1000)]
    assert targets == pytest.approx([2, 2.5, 3, 6, 6, 6])


# An average of the weights, and a schedule, in one program


def test_one_program_follows_the_schedule_and_averages_the_weights(tiny, one_device):
    config = config_of(tiny, "optimizer.ema_decay=0.75", "tokens_per_chunk_start=(2.0,)",
                       "tokens_per_chunk_ramp_steps=2", "data.loss_after=the ")
    program, batches = compile_program(config, one_device), batches_of(config)
    with use_mesh(one_device):
        state = program.init(jax.random.key(0))
        average, targets = jax.tree.map(np.asarray, state.params), []
        for step in range(4):
            batch = batches[step]
            state, metrics = program.step(state, put_batch(batch, batch_sharding(one_device)))
            average = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * np.asarray(new), average, state.params)
            targets.append(float(metrics["stage0/target_tokens_per_chunk"]))
            assert metrics["train/target_bytes"] == _num_targets(batch) > 0
    assert targets == pytest.approx([2, 3, 4, 4])
    assert program.step._cache_size() == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), weights(state), average)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), average, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


def _num_targets(batch) -> int:
    ids = batch["segment_ids"]
    return np.count_nonzero((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0) & batch["loss_mask"][:, 1:])


# Bytes to predict, chosen by a marker


@pytest.mark.parametrize(("typed", "marker"), [
    ("A:", b"A:"), (r"\nA:\t", b"\nA:\t"), ("grün✓", "grün✓".encode()), (r"\\n", b"\\n"),
    (r"\u2713", b"\xe2\x9c\x93"),
    ("\udcff", b"\xff"),  # what Python makes of a byte on a command line that is not UTF-8
])
def test_a_marker_is_text_with_pythons_escapes(typed, marker):
    assert DataConfig(loss_after=typed).loss_marker == marker


def test_evaluate_counts_only_what_follows_the_marker(finished_run, capsys):
    """Against numpy, document by document: the bytes before the marker are read and not predicted."""
    evaluate.main([f"--workdir={finished_run}", "--config.data.loss_after=import", "--config.eval_bytes=100_000"])
    head, bits, *_ = capsys.readouterr().out.splitlines()
    with SavedRun.open(finished_run) as run:
        params = run.params()
    split, size = run.corpus().split("held_out"), run.config.data.sequence_length
    order = np.random.RandomState(0).permutation(len(split.lengths))
    documents = [split.read(document, 0, int(split.lengths[document])).tobytes() for document in order]
    tokens = np.concatenate([np.frombuffer(bytes([BOS]) + text, np.uint8) for text in documents]).astype(np.int32)
    ids = np.repeat(np.arange(len(documents)) + 1, [1 + len(text) for text in documents])
    is_target = np.concatenate([np.arange(-1, len(text)) >= (text + b"import").find(b"import") + 6
                                for text in documents])
    num_rows = -(-(len(tokens) - 1) // size)
    padded = [np.pad(each, (0, num_rows * size + 1 - len(tokens))) for each in (tokens, ids, is_target)]
    inputs, segments = (each[:-1].reshape(num_rows, size) for each in padded[:2])
    model = HNetLM(run.config.model.at_full_capacity())
    logits = jax.jit(model.apply)({"params": params}, inputs, segments).logits
    odds = np.exp(np.asarray(logits, np.float64)).reshape(-1, 256)
    probability = np.take_along_axis(odds, padded[0][1:, None], axis=-1)[:, 0] / odds.sum(axis=-1)
    assert head == f"step 20, {is_target.sum():,} held-out bytes"
    assert float(bits.split()[1]) == pytest.approx(-np.log2(probability[padded[2][1:]]).mean(), abs=1e-4)


# Weights of other runs


def _save(workdir: Path, config: RunConfig, state, **meta) -> Path:
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.save(1, state, {"config": saved_fields(config)} | meta)
    checkpoints.close()
    return workdir


def _fresh(config: RunConfig, mesh, tmp_path: Path):
    with use_mesh(mesh):
        program = compile_program(config, mesh)
        return start_or_resume(config, program, Checkpoints(tmp_path / "none", keep=1), corpus=None)


def _assert_equal(actual, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_new_run_starts_from_the_weights_of_another_and_from_nothing_else(
    tiny, finished_run, one_device, tmp_path
):
    config = config_of(tiny, f"init_from={finished_run}", "optimizer.ema_decay=0.9", "seed=5")
    state, seconds = _fresh(config, one_device, tmp_path)
    with SavedRun.open(finished_run) as saved:
        _assert_equal(state.params, saved.params())
    _assert_equal(state.ema, state.params)
    assert int(state.step) == seconds == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


@pytest.fixture
def with_boundary_lm(configs):
    """A config whose router looks at the entropy of the model of isotropic.py."""
    lm = config_of(configs / "isotropic.py")
    tiny = config_of(configs / "tiny.py")
    outer = tiny.model.stages[0].with_chunking(router="entropy")
    model = dataclasses.replace(tiny.model, stages=(outer, *tiny.model.stages[1:]), boundary_lm=lm.model)
    return lm, dataclasses.replace(tiny, model=model)


def test_the_boundary_lm_has_the_weights_of_a_run_of_the_same_model(with_boundary_lm, one_device, tmp_path):
    lm, config = with_boundary_lm
    with pytest.raises(UsageError, match=r"boundary_lm needs trained weights: .* --config.boundary_lm_from=runs/"):
        _fresh(config, one_device, tmp_path)
    shapes = compile_program(lm, one_device).abstract_state
    state = jax.tree.map(lambda shape: jnp.full(shape.shape, 7, shape.dtype), shapes)
    config = dataclasses.replace(config, boundary_lm_from=str(_save(tmp_path / "lm", lm, state)))
    found = _fresh(config, one_device, tmp_path)[0].params
    _assert_equal(found["boundary_lm"], state.params)

    other = dataclasses.replace(config.model.boundary_lm, tie_embeddings=True)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, boundary_lm=other))
    with pytest.raises(UsageError, match=r"boundary_lm_from=.*: its model.tie_embeddings was False, is True here"):
        _fresh(config, one_device, tmp_path)


@pytest.mark.parametrize(("fields", "message"), [
    ({"init_from": "/nowhere"}, "config.init_from=/nowhere: no run has saved a checkpoint there"),
    ({"boundary_lm_from": "/nowhere"}, "config.boundary_lm_from=/nowhere: config.model has no boundary_lm"),
])
def test_weights_that_are_not_there_or_not_wanted_are_refused(tiny, one_device, tmp_path, fields, message):
    with pytest.raises(UsageError, match=message):
        _fresh(dataclasses.replace(config_of(tiny), **fields), one_device, tmp_path)


def test_imported_weights_are_not_trained_in_their_own_directory(tiny, tmp_path):
    config = config_of(tiny)
    _save(tmp_path, config, {"params": jnp.zeros(3)}, contents="parameters")
    with pytest.raises(UsageError, match=rf"in another --workdir with --config.init_from={tmp_path}$"):
        train.main([f"--config={tiny}", f"--workdir={tmp_path}"])


# Boundaries past the capacity


def _counts(boundaries: float, overflow: float) -> dict[str, float]:
    return {"stage0/boundaries": boundaries, "stage0/overflow_boundaries": overflow, "stage0/overflow_rows": 3,
            "stage0/capacity": 24}


def test_more_overflow_than_allowed_is_told_with_the_fields_to_change(tiny):
    config = config_of(tiny, "max_overflow_fraction=0.25")
    assert overflow_problem(config, _counts(100, 25)) == ""
    assert overflow_problem(config, _counts(100, 26)) == (
        "26 of the 100 boundaries of stage0 are past its capacity of 24 slots per row, in 3 rows; raise "
        "config.model.stages.stage0.chunking.capacity 0.75, or set "
        "config.model.stages.stage0.chunking.overflow to 'grow', or raise config.max_overflow_fraction 0.25")
    assert overflow_problem(config_of(tiny), _counts(100, 100)) == "", "1 never stops"
    never = config_of(tiny, "max_overflow_fraction=0")
    assert overflow_problem(never, _counts(100, 0)) == "" != overflow_problem(never, _counts(100, 1))


def test_overflow_that_is_an_error_stops_training_by_its_name_and_not_as_nan(
    tiny, one_device, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "make_mesh", lambda model_axis: one_device)
    field = "--config.model.stages.stage0.chunking"
    overrides = f"{field}.capacity=0.125", f"{field}.overflow=error"
    with pytest.raises(RunError) as refusal:
        train.main([f"--config={tiny}", f"--workdir={tmp_path}", "--config.checkpoint_every=1", *overrides])
    assert re.fullmatch(
        r"step 1: \d+ of the \d+ boundaries of stage0 are past its capacity of 4 slots per row, in 8 rows; "
        r"raise config\.model\.stages\.stage0\.chunking\.capacity 0\.125, or set "
        r"config\.model\.stages\.stage0\.chunking\.overflow 'error' to 'grow' or 'merge'; there is no checkpoint",
        str(refusal.value))
