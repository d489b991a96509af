"""Every mixer that a layout can name: it trains, and decodes what it trained."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet import HNetConfig, HNetLM
from hnet.layout import MIXERS, parse_layout
from tests.support.models import compiled, make_stage, random_params, stepped_logits

SIZES = dict(num_heads=2, rotary_width=4, feed_forward_width=16, state_size=4, expand=1, head_width=6)
ALL = "".join((name.capitalize() if index % 2 else name) + "1" for index, name in enumerate(MIXERS))
CONFIG = HNetConfig(stages=(make_stage(width=12, encoder=ALL, **SIZES),), vocab_size=31)


def test_a_stack_of_all_mixers_decodes_ragged_rows_as_it_reads_them_at_once():
    params = random_params(CONFIG)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 9), dtype=np.int32)
    whole = compiled(CONFIG)(params, tokens, np.ones_like(tokens)).logits
    stepped = stepped_logits(CONFIG, params, tokens, prompt_lengths=(1, 6))
    np.testing.assert_allclose(stepped, whole, atol=2e-4 * float(jnp.std(whole)))


@pytest.mark.slow
def test_every_parameter_of_every_mixer_is_trained():
    params = random_params(CONFIG)
    tokens = np.random.default_rng(1).integers(0, 31, (2, 9), dtype=np.int32)

    def loss(params):
        return jnp.sum(HNetLM(CONFIG).apply({"params": params}, tokens).logits ** 2)

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(gradient).all() and np.any(gradient), path


def test_names_run_into_each_other_without_doubt():
    assert parse_layout("m4mlstm2Mlstm1M1gru1griffin3") == (
        ("m", 4), ("mlstm", 2), ("Mlstm", 1), ("M", 1), ("gru", 1), ("griffin", 3))
    with pytest.raises(ValueError, match=r"'gpt2' must be names of mixers.*mixers are m, t, gdn, gla"):
        parse_layout("gpt2")
    with pytest.raises(ValueError, match="state_size 3 must be even"):
        make_stage(width=12, encoder="ssm1", state_size=3)
