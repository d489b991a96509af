"""Two small models of the official release, in float64, against ours: masks, logits, losses, gradients."""
import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hnet import HNetLM, from_official_json, load_official_params
from tests.support.assertions import (
    GOLDEN_GRADIENT_LIMIT,
    GOLDEN_LOGITS_ERROR,
    GOLDEN_LOSS_ERROR,
    GOLDEN_PROBABILITY_ERROR,
    GRADIENT_FLOOR,
    assert_golden,
    golden,
)

MODELS = pytest.mark.parametrize("name", ["hnet_a_1stage", "hnet_b_2stage"])


@cache
def _load(name):
    data = golden(name)
    config = from_official_json(str(data["config_json"]))
    params = load_official_params(_under(data, "param/"), config)
    model = HNetLM(config)
    run = jax.jit(lambda params, tokens, segment_ids: model.apply({"params": params}, tokens, segment_ids))
    return data, config, params, run


def _under(data, prefix):
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}


def _check_stages(output, data):
    """Masks exactly, probabilities closely: real tokens of every stage, in order."""
    for name, stage in output.stages.items():
        mask = np.asarray(stage.is_real)
        np.testing.assert_array_equal(np.asarray(stage.boundary_mask)[mask], data[f"{name}/boundary_mask"])
        error = np.asarray(stage.boundary_prob)[mask] - data[f"{name}/boundary_prob"][:, 1]
        assert np.abs(error).max() <= GOLDEN_PROBABILITY_ERROR


def _check_logits(actual, expected):
    assert np.abs(np.asarray(actual) - expected).max() <= GOLDEN_LOGITS_ERROR


@MODELS
def test_rows_match_the_packed_run(name):
    data, _, params, run = _load(name)
    output = run(params, data["input_ids"], np.ones_like(data["input_ids"]))
    assert output.logits.dtype == jnp.float32
    _check_logits(output.logits, data["logits_packed"])
    _check_stages(output, data)
    ratio = [float(stage.ratio_loss(float(data["ratio_N"]))) for stage in output.stages.values()]
    np.testing.assert_allclose(ratio, data["load_balancing_loss"], atol=GOLDEN_LOSS_ERROR)
    assert all((np.asarray(stage.num_overflow) == 0).all() for stage in output.stages.values())


@MODELS
def test_all_rows_packed_into_one_match_too(name):
    data, _, params, run = _load(name)
    rows, length = data["input_ids"].shape
    segment_ids = np.repeat(np.arange(rows, dtype=np.int32) + 1, length)[None]
    output = run(params, data["input_ids"].reshape(1, -1), segment_ids)
    _check_logits(output.logits.reshape(data["logits_packed"].shape), data["logits_packed"])
    _check_stages(output, data)


@MODELS
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side_matches_the_padded_run(name, side):
    data, _, params, run = _load(name)
    tokens, mask = data["input_ids"], data["mask"]
    shift = np.where(side == "left", (~mask).sum(1), 0)
    source = (np.arange(mask.shape[1]) - shift[:, None]) % mask.shape[1]
    output = run(params, np.take_along_axis(tokens, source, 1),
                 np.take_along_axis(mask, source, 1).astype(np.int32) * 7)
    logits = np.stack([np.roll(row, -s, axis=0) for row, s in zip(output.logits, shift, strict=True)])
    _check_logits(np.where(mask[..., None], logits, 0), data["logits_mask_padded"])
    boundary = np.asarray(output.stages["stage0"].boundary_mask)
    boundary = np.stack([np.roll(row, -s) for row, s in zip(boundary, shift, strict=True)])
    np.testing.assert_array_equal(boundary, data["maskpad/stage0/boundary_mask"])
    ratio = [float(stage.ratio_loss(float(data["ratio_N"]))) for stage in output.stages.values()]
    np.testing.assert_allclose(ratio, data["load_balancing_loss_ragged"], atol=GOLDEN_LOSS_ERROR)


@MODELS
def test_loss_and_every_gradient_match(name):
    data, config, params, run = _load(name)
    tokens = data["input_ids"]

    def loss_fn(params):
        output = run(params, tokens, np.ones_like(tokens))
        nats = optax.softmax_cross_entropy_with_integer_labels(output.logits[:, :-1], tokens[:, 1:]).mean()
        ratio = sum(stage.ratio_loss(float(data["ratio_N"])) for stage in output.stages.values())
        return nats + float(data["ratio_alpha"]) * ratio

    loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(params)
    np.testing.assert_allclose(loss, data["loss"], atol=GOLDEN_LOSS_ERROR)
    expected = load_official_params(_under(data, "grad/"), config)
    assert_golden(gradient, expected, limit=GOLDEN_GRADIENT_LIMIT, floor=GRADIENT_FLOOR)


@MODELS
def test_rounding_in_the_dechunk_changes_logits_as_much_as_in_the_release(name):
    """The worst of some ten thousand logits depends on which numbers lie between two roundings: hence 15 %."""
    data, config, params, _ = _load(name)
    model = HNetLM(dataclasses.replace(config, bfloat16_dechunk=True))
    output = jax.jit(model.apply)({"params": params}, data["input_ids"])
    worst = np.abs(output.logits - data["logits_packed"]).max()
    np.testing.assert_allclose(worst, data["bf16_dechunk_logits_abs_dev"], rtol=0.15)
    for stage_name, stage in output.stages.items():
        mask = np.asarray(stage.is_real)
        np.testing.assert_array_equal(np.asarray(stage.boundary_mask)[mask], data[f"{stage_name}/boundary_mask"])
