"""Rules that stretch rotary waves, against their formulas in plain Python and against the transformers library."""
import math

import jax.numpy as jnp
import numpy as np
import pytest

from layers import RotaryScaling, rotary
from tests.support.assertions import SAME_COMPUTATION

WIDTH, BASE = 64, 100_000.0
FAST = {"kind": "yarn", "factor": 8.0, "original_length": 2048}
SCALINGS = {
    "linear": RotaryScaling(kind="linear", factor=4.0),
    "ntk": RotaryScaling(kind="ntk", factor=4.0),
    "llama3": RotaryScaling(kind="llama3", factor=8.0, original_length=4096),
    "yarn": RotaryScaling(**FAST),
    "yarn, other turns": RotaryScaling(**FAST, fast_turns=16.0, slow_turns=2.0),
    "yarn, own factor": RotaryScaling(**FAST, attention_factor=1.25),
}


def _frequency(j, scaling):
    """The frequency of pair j, one number at a time."""
    plain = BASE ** (-2 * j / WIDTH)
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "ntk":
        return (BASE * scaling.factor ** (WIDTH / (WIDTH - 2))) ** (-2 * j / WIDTH)
    if scaling.kind == "llama3":
        wave_length = 2 * math.pi / plain
        if wave_length < scaling.original_length / scaling.high_frequency_factor:
            return plain
        if wave_length > scaling.original_length / scaling.low_frequency_factor:
            return plain / scaling.factor
        share = (scaling.original_length / wave_length - scaling.low_frequency_factor) / (
            scaling.high_frequency_factor - scaling.low_frequency_factor)
        return (1 - share) * plain / scaling.factor + share * plain

    def dimension(turns):  # whose wave turns this often: 2 pi base^(2 j / width) turns = length
        return WIDTH * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(BASE))

    low, high = math.floor(dimension(scaling.fast_turns)), math.ceil(dimension(scaling.slow_turns))
    ramp = min(max((j - low) / (high - low), 0), 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def _rotated_ones(scaling, position):
    """Rotates a head whose first half is 1: the result is the cosines, then the sines, of all pairs."""
    head = jnp.concatenate([jnp.ones(WIDTH // 2), jnp.zeros(WIDTH // 2)])[None, None, None]
    return np.asarray(rotary(head, jnp.full((1, 1), position), width=WIDTH, base=BASE, scaling=scaling))[0, 0, 0]


@pytest.mark.parametrize("name", SCALINGS)
def test_every_pair_turns_as_fast_as_the_formula_says(name):
    scaling, position = SCALINGS[name], 7
    amplitude = 1.0
    if scaling.kind == "yarn":
        amplitude = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    angles = np.array([position * _frequency(j, scaling) for j in range(WIDTH // 2)])
    expected = amplitude * np.concatenate([np.cos(angles), np.sin(angles)])
    np.testing.assert_allclose(_rotated_ones(scaling, position), expected, atol=SAME_COMPUTATION)


def test_yarn_keeps_the_fastest_waves_and_stretches_the_slowest_by_the_whole_factor():
    angles = [np.arctan2(sine, cosine) for cosine, sine in (
        np.split(_rotated_ones(scaling, 1), 2) for scaling in (SCALINGS["yarn"], None))]
    ratio = angles[0] / angles[1]
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(1 / 8)
    assert (np.diff(ratio) <= 1e-6).all() and 1 / 8 < ratio[len(ratio) // 2] < 1


def test_a_factor_of_one_changes_nothing():
    for kind in ("linear", "ntk", "llama3", "yarn"):
        np.testing.assert_allclose(
            _rotated_ones(RotaryScaling(kind=kind, factor=1.0), 7), _rotated_ones(None, 7), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "ntk"])
def test_frequencies_are_those_of_the_transformers_library(name):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name]
    rope = {"rope_type": scaling.kind, "rope_theta": BASE, "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length}
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_frequency_factor,
                 "high_freq_factor": scaling.high_frequency_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.fast_turns, "beta_slow": scaling.slow_turns}
        rope |= {"attention_factor": scaling.attention_factor} if scaling.attention_factor else {}
    config = transformers.LlamaConfig(
        hidden_size=2 * WIDTH, num_attention_heads=2, head_dim=WIDTH, rope_parameters=rope,
        max_position_embeddings=int(scaling.original_length * scaling.factor))
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu")
    angles = 7 * frequencies.numpy().astype(np.float64)
    expected = amplitude * np.concatenate([np.cos(angles), np.sin(angles)])
    np.testing.assert_allclose(_rotated_ones(scaling, 7), expected, atol=SAME_COMPUTATION)


@pytest.mark.parametrize(("fields", "message"), [
    ({"kind": "dynamic"}, "kind 'dynamic' is not one of llama3, linear, ntk, yarn"),
    ({"factor": 0.5}, "factor 0.5 and original_length 8192 must be at least 1"),
    ({"slow_turns": 40.0}, "slow_turns 40.0 must be above 0 and below fast_turns 32.0"),
    ({"low_frequency_factor": 4.0}, "low_frequency_factor 4.0 must be above 0 and below high_frequency_factor"),
    ({"attention_factor": 0.0}, "attention_factor 0.0 must be above 0"),
])
def test_settings_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RotaryScaling(**fields)
