"""A mixer with sizes of its own: its config travels in the stack, in JSON and on the command line."""
import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import RunConfig
from experiments.config.command_line import apply_overrides
from experiments.config.files import config_from_json, config_to_json
from experiments.errors import UsageError
from hnet import HNetConfig, StackConfig, StageConfig, layout, register_mixer, residual_depth
from layers.mixers.mixer import Mixer
from tests.support.models import compiled, random_params, stepped_logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftConfig:
    """Distance in tokens that the mixer looks back."""

    distance: int = 1


class Shift(Mixer):
    """Adds up tokens at a distance; no state, so it does not decode."""

    distance: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, segment_ids=None, state=None):
        before = jnp.pad(x, ((0, 0), (self.distance, 0), (0, 0)))[:, : x.shape[1]]
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out")(before), None


class Total(Mixer):
    """Adds up all tokens of a row so far; its state is the sum."""

    @nn.compact
    def __call__(self, x, segment_ids=None, state=None):
        real = x if segment_ids is None else jnp.where((segment_ids != 0)[..., None], x, 0)
        total = jnp.cumsum(real, axis=1) + (0 if state is None else state[:, None])
        return nn.Dense(x.shape[-1], name="out")(total), total[:, -1]

    def empty_state(self, batch, width, max_length):
        return jnp.zeros((batch, width), jnp.float32)


def make(stack, *, out_init_std, dtype, **module):
    return Shift(stack.mixer_config(ShiftConfig).distance, dtype, **module)


def check(stack):
    if stack.mixer_config(ShiftConfig).distance > stack.width:
        raise ValueError(f"mixers.shift.distance {stack.mixer_config(ShiftConfig).distance} is above the width")


@pytest.fixture
def shift():
    register_mixer("shift", "a shift of tokens", make, config=ShiftConfig, check=check)
    yield
    del layout._MIXERS["shift"], layout._CONFIGS["shift"]


def run_config(*mixers) -> RunConfig:
    stage = StageConfig(stack=StackConfig(width=16, mixers=mixers, feed_forward_width=8), encoder="shift1Shift1")
    return RunConfig(model=HNetConfig(stages=(stage,)), tokens_per_chunk=())


def test_its_config_reaches_the_module(shift):
    tokens = jnp.arange(12).reshape(1, 12)
    for mixers, distance in (((), 1), ((ShiftConfig(distance=5),), 5)):
        config = run_config(*mixers).model
        params, ones = random_params(config), jnp.ones_like(tokens)
        logits, other = (compiled(config)(params, each, ones).logits for each in (tokens, tokens.at[0, 0].set(99)))
        changed = jnp.any(logits != other, axis=(0, 2))
        assert list(changed.nonzero()[0]) == [index for index in (0, distance, 2 * distance) if index < 12]


def test_its_config_travels_in_json_and_on_the_command_line(shift):
    config = run_config(ShiftConfig(distance=3))
    assert config_from_json(config_to_json(config), RunConfig) == config
    path = "--config.model.stages.stage0.stack.mixers"
    for before in (config, run_config()):
        after = apply_overrides(before, [f"{path}.shift.distance=7"])
        assert after.model.stages[0].stack.mixer_config(ShiftConfig).distance == 7
    with pytest.raises(UsageError, match="no field 'distanse'; did you mean 'distance'"):
        apply_overrides(config, [f"{path}.shift.distanse=7"])
    with pytest.raises(UsageError, match=r"tokens in layout 'shift1Shift1': .*distance 17 is above the width"):
        apply_overrides(config, [f"{path}.shift.distance=17"])


def test_a_mixer_of_another_package_decodes_what_it_reads_at_once():
    register_mixer("total", "a sum of tokens", lambda stack, *, out_init_std, dtype, **module: Total(**module))
    try:
        stack = StackConfig(width=16, feed_forward_width=8)
        config = HNetConfig(stages=(
            StageConfig(stack=stack, encoder="total1Total2", decoder="total1"),
            StageConfig(stack=stack, encoder="Total1")))
        params = random_params(config)
        tokens = np.random.default_rng(0).integers(0, 256, (2, 9), dtype=np.int32)
        whole = compiled(config)(params, tokens, np.ones_like(tokens)).logits
        stepped = stepped_logits(config, params, tokens, prompt_lengths=(1, 6))
        np.testing.assert_allclose(stepped, whole, atol=2e-4 * float(jnp.std(whole)))
    finally:
        del layout._MIXERS["total"]


def test_where_it_is_not_registered_it_is_missed_by_name(shift):
    text = config_to_json(run_config(ShiftConfig(distance=3)))
    saved = layout._CONFIGS.pop("shift")
    try:
        with pytest.raises(UsageError, match=r"mixers 'shift' is not one of .*; the module that registers it"):
            config_from_json(text, RunConfig)
    finally:
        layout._CONFIGS["shift"] = saved


@pytest.mark.parametrize(("name", "config", "message"), [
    ("Shift", None, "mixer name 'Shift' must be lower-case letters"),
    ("m2", None, "mixer name 'm2' must be lower-case letters"),
    ("gla", None, r"mixer 'gla' is registered already \(gated linear attention\)"),
    ("other", ShiftConfig, "ShiftConfig is the config of mixer 'shift'; give mixer 'other' one of its own"),
    ("other", dict, "must be a frozen dataclass"),
    ("other", StageConfig, "must have defaults"),
])
def test_names_and_configs_that_do_not_fit_are_refused(shift, name, config, message):
    with pytest.raises(ValueError, match=message):
        register_mixer(name, "", make, config=config)
    assert "other" not in layout.MIXERS


def test_a_function_that_takes_no_parent_is_refused():
    with pytest.raises(ValueError, match=r"make of mixer 'other' must take .*\*\*module.*'parent'"):
        register_mixer("other", "", lambda stack, *, out_init_std, dtype, name: None)
    assert "other" not in layout.MIXERS


def test_a_stack_holds_one_config_of_each_mixer_and_no_others(shift):
    for mixers in ((3,), (ShiftConfig(), ShiftConfig())):
        with pytest.raises(ValueError, match=r"registered mixers, one of each: .*ShiftConfig"):
            StackConfig(width=16, mixers=mixers)


def test_residual_depth_counts_a_feed_forward_network_as_a_second_write():
    assert residual_depth("m4", "T2m1") == 4 + 4 + 1
    assert residual_depth("") == 0
