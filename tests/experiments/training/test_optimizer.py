import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from experiments.config import OptimizerConfig, RunConfig
from experiments.training.optimizer import (
    decay_mask,
    learning_rate,
    lr_multipliers,
    make_optimizer,
    stage_multipliers,
)
from hnet import HNetConfig, from_official_json, parameter_shapes
from hnet.pretrained.hnet_release import relabelling
from tests.support.assertions import golden
from tests.support.models import make_stage

NUM_STEPS = 100


def _rates(**fields) -> np.ndarray:
    """The learning rate of every step."""
    schedule = learning_rate(OptimizerConfig(peak_lr=2.0, final_lr_fraction=0.1, **fields), NUM_STEPS)
    return np.asarray(jax.vmap(schedule)(np.arange(NUM_STEPS)))


def _run(optimizer: OptimizerConfig, widths: tuple[int, ...] = (32, 64), chunk: float = 4.0) -> RunConfig:
    stages = [make_stage(width=width, encoder="m1", decoder="m1") for width in widths]
    stages[-1] = dataclasses.replace(stages[-1], decoder="")
    return RunConfig(model=HNetConfig(stages=tuple(stages)), optimizer=optimizer, num_steps=NUM_STEPS,
                     tokens_per_chunk=(chunk,) * (len(widths) - 1))


@pytest.mark.parametrize("schedule", ["wsd", "wsd_inverse_sqrt", "cosine"])
def test_warm_up_rises_in_equal_steps_to_the_peak_and_the_last_step_has_the_final_rate(schedule):
    rates = _rates(schedule=schedule, warmup_steps=10)
    np.testing.assert_allclose(rates[:10], np.linspace(0.2, 2.0, 10), rtol=1e-6)
    assert rates.argmax() == 9
    np.testing.assert_allclose(rates[-1], 0.2, rtol=1e-5)


def test_wsd_stays_at_the_peak_and_falls_as_one_minus_the_root():
    rates = _rates(schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    np.testing.assert_allclose(rates[10:80], 2.0)
    progress = np.arange(1, 21) / 20
    np.testing.assert_allclose(rates[80:], 0.2 + 1.8 * (1 - np.sqrt(progress)), rtol=1e-5)


def test_wsd_inverse_sqrt_falls_as_one_over_the_root_of_a_line_between_both_ends():
    rates = _rates(schedule="wsd_inverse_sqrt", warmup_steps=10, decay_fraction=0.2)
    np.testing.assert_allclose(rates[10:80], 2.0)
    np.testing.assert_allclose(rates[79:] ** -2, np.linspace(2.0**-2, 0.2**-2, 21), rtol=1e-5)


def test_warm_up_may_be_a_fraction_of_the_steps():
    for schedule in ("wsd", "cosine"):
        by_fraction = _rates(schedule=schedule, warmup_steps=0, warmup_fraction=0.1)
        np.testing.assert_array_equal(by_fraction, _rates(schedule=schedule, warmup_steps=10))


def test_cosine_is_half_way_down_in_the_middle_and_never_rises():
    rates = _rates(schedule="cosine", warmup_steps=10)
    assert (np.diff(rates[9:]) < 0).all()
    np.testing.assert_allclose(rates[54], (2.0 + 0.2) / 2, rtol=1e-5)  # 45 of 90 steps from step 9
    np.testing.assert_allclose(rates[9:] + rates[9:][::-1], 2.0 + 0.2, rtol=1e-5)


def test_without_decay_or_warm_up_the_rate_is_constant():
    np.testing.assert_allclose(_rates(warmup_steps=0, decay_fraction=0.0), 2.0)


@pytest.mark.parametrize("name", ["hnet_a_1stage", "hnet_b_2stage"])
def test_multipliers_and_official_decay_are_those_of_the_release(name):
    data = golden(name)
    model = from_official_json(str(data["config_json"]))
    params = parameter_shapes(model)
    config = OptimizerConfig(
        stage_lr_multipliers=tuple(map(float, data["opt/stage_multipliers"])), decay_groups="official",
        weight_decay=0.1)
    multipliers = flatten_dict(lr_multipliers(config.stage_lr_multipliers, params))
    decays = flatten_dict(decay_mask(config, params))

    official = {str(key): row for key, *row in zip(
        data["opt/names"], data["opt/lr_multiplier"], data["opt/weight_decay"], strict=True)}
    seen = set()
    for entry in relabelling(model):  # some official tensors are several of ours, and stacks the reverse
        multiplier, decay = official[entry.theirs]
        assert multipliers[entry.path] == pytest.approx(multiplier), entry
        assert config.weight_decay * decays[entry.path] == pytest.approx(decay), entry
        seen.add(entry.path)
    assert seen == set(multipliers) == set(decays)
    assert {entry.theirs for entry in relabelling(model)} == set(official)


@pytest.mark.parametrize(("widths", "chunk", "expected"), [
    ((1024, 1536), 6.0, (2.63, 0.88)),
    ((1024, 2048), 6.0, (3.03, 0.88)),
    ((1024, 1024, 1536), 3.0, (2.63, 1.52, 0.71)),
    ((1024, 1536, 2048), 3.0, (3.03, 1.43, 0.71)),
])
def test_the_papers_rule_gives_the_multipliers_of_its_models(widths, chunk, expected):
    config = _run(OptimizerConfig(stage_lr_rule="paper"), widths, chunk)
    np.testing.assert_allclose(stage_multipliers(config), expected, atol=0.006)
    assert stage_multipliers(_run(OptimizerConfig(), widths, chunk)) == (1.0,) * len(widths)


PARAMS = {
    "embedding": 1.0, "lm_head": 1.0,
    "stage0": {"kernel": 1.0, "stage1": {"kernel": 1.0, "bias": 1.0, "scale": 1.0}},
}


def _first_update(config: OptimizerConfig, params, grads):
    params, grads = (jax.tree.map(lambda z: jnp.full(3, z, jnp.float32), tree) for tree in (params, grads))
    optimizer = make_optimizer(config, NUM_STEPS, params, multipliers=stage_multipliers(_run(config)))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return jax.tree.map(lambda z: float(z[0]), updates)


CONSTANT = OptimizerConfig(
    peak_lr=0.5, warmup_steps=0, decay_fraction=0.0, weight_decay=0.1, stage_lr_multipliers=(3.0, 2.0))


def test_a_multiplier_scales_the_decay_too_and_only_kernels_decay():
    updates = _first_update(CONSTANT, PARAMS, jax.tree.map(lambda _: 0.0, PARAMS))
    outer, inner = -0.5 * 3.0 * 0.1, -0.5 * 2.0 * 0.1
    assert updates["lm_head"] == pytest.approx(outer) and updates["stage0"]["kernel"] == pytest.approx(outer)
    assert updates["stage0"]["stage1"] == pytest.approx({"kernel": inner, "bias": 0.0, "scale": 0.0})
    assert updates["embedding"] == 0.0


def test_a_multiplier_scales_the_step_and_without_multipliers_there_is_none():
    grads = jax.tree.map(lambda _: 0.01, PARAMS)
    config = dataclasses.replace(CONSTANT, weight_decay=0.0)
    scaled = _first_update(config, PARAMS, grads)
    plain = _first_update(dataclasses.replace(config, stage_lr_multipliers=()), PARAMS, grads)
    assert plain["stage0"]["stage1"]["scale"] == pytest.approx(-0.5, rel=1e-5)  # Adam's first step has size 1
    assert scaled["lm_head"] == pytest.approx(3 * plain["lm_head"])
    assert scaled["stage0"]["stage1"]["scale"] == pytest.approx(2 * plain["stage0"]["stage1"]["scale"])


def test_every_stage_needs_a_multiplier():
    with pytest.raises(ValueError, match=r"multipliers \(1.0,\) has 1 values, and none for stage 1, which"):
        make_optimizer(CONSTANT, NUM_STEPS, PARAMS)


def test_parameters_of_other_models_are_put_into_groups_by_their_paths():
    params = {"slow": jnp.ones(3), "fast": jnp.ones(3), "kept": jnp.ones(3)}
    groups = {"slow": 0, "fast": 1, "kept": None}
    optimizer = make_optimizer(
        dataclasses.replace(CONSTANT, weight_decay=0.0), NUM_STEPS, params,
        stage_of=lambda path: groups[path[0].key], multipliers=(1.0, 4.0))
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["fast"], 4 * updates["slow"])
    assert (updates["kept"] == 0).all() and (updates["slow"] != 0).all()


def test_a_boundary_lm_is_frozen_with_all_its_stages():
    params = {"kernel": 1.0, "boundary_lm": {"lm_head": 1.0, "stage0": {"stage1": {"kernel": 1.0}}}}
    updates = _first_update(CONSTANT, params, jax.tree.map(lambda _: 0.01, params))
    assert updates["kernel"] != 0
    assert not any(jax.tree.leaves(updates["boundary_lm"]))


@pytest.mark.parametrize(("limit", "expected"), [(2.0, 2.0), (0.0, 50.0), (100.0, 50.0)])
def test_gradients_are_scaled_down_to_the_largest_norm_and_0_is_off(limit, expected):
    """Seen in Adam's first moment, which is (1 - b1) times the gradient."""
    config = dataclasses.replace(CONSTANT, max_grad_norm=limit, stage_lr_multipliers=())
    params = {"kernel": jnp.zeros(2)}
    optimizer = make_optimizer(config, NUM_STEPS, params, multipliers=(1.0, 1.0))
    _, state = optimizer.update({"kernel": jnp.array([30.0, 40.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(optax.tree.get(state, "mu")) / 0.1, expected, rtol=1e-5)
