"""Every mixer that a layout can name: it trains, and decodes what it trained."""
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet import HNetConfig, HNetLM
from hnet.layout import MIXER_CONFIGS, MIXERS, parse_layout
from hnet.mixers import MoBAConfig, NativeSparseConfig
from hnet.stack import Stack
from hnet.stack_state import apply_updates, empty_state, empty_updates
from tests.support.inputs import Draw
from tests.support.models import compiled, make_stack, make_stage, random_params, stepped_logits

SMALL = {"moba": MoBAConfig(top_k=2, block=3), "nsa": NativeSparseConfig(num_selected=3, window=2, block=3)}
SIZES = dict(num_heads=2, rotary_width=4, feed_forward_width=16, state_size=4, expand=1, head_width=6,
             mixers=tuple(SMALL.get(name) or config() for name, config in MIXER_CONFIGS.items()))
ALL = "".join((name.capitalize() if index % 2 else name) + "1" for index, name in enumerate(MIXERS))
CONFIG = HNetConfig(stages=(make_stage(width=12, encoder=ALL, **SIZES),), vocab_size=31)


@pytest.mark.slow  # each mixer does in the tests above
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


B, D, T = 2, 12, 16
# Documents that begin in a call or with one, and padding anywhere. Read in parts, an id may come again.
DOCUMENTS = np.array([[7] * 5 + [2] * 3 + [9] * 8, [0] + [1] * 4 + [0] * 2 + [3] + [1] * 8], np.int32)
UNIQUE = np.where(np.arange(T) < 8, DOCUMENTS, DOCUMENTS + 20 * (DOCUMENTS == 1))


@cache
class _Stack:
    """A stack of two layers of one mixer, with random weights."""

    def __init__(self, name: str) -> None:
        self.sizes = f"{name}2", make_stack(width=D, **SIZES)
        self.stack = Stack(*self.sizes, 0.02, jnp.float32)
        self.x = Draw(0)(B, T, D)
        draw = Draw(1)
        shapes = nn.unbox(jax.eval_shape(self.stack.init, jax.random.key(0), self.x, jnp.asarray(DOCUMENTS)))
        self.params = jax.tree.map(lambda leaf: 0.5 * draw(*leaf.shape), shapes)
        self.whole = jax.jit(lambda x, ids: self.stack.apply(self.params, x, ids).y)

        @jax.jit
        def step(x, ids, state):
            output = self.stack.apply(self.params, x, ids, state)
            return output.y, apply_updates(*self.sizes, jnp.float32, state, output.update)

        self.step = step

    def read_in_parts(self):
        state, outputs = empty_state(*self.sizes, B, T, jnp.float32), []
        for start in range(0, T, 4):
            y, state = self.step(self.x[:, start : start + 4], DOCUMENTS[:, start : start + 4], state)
            outputs.append(y)
        return np.concatenate(outputs, axis=1), state


@pytest.mark.parametrize("name", MIXERS)
def test_packed_rows_read_in_parts_equal_rows_read_at_once_and_documents_alone(name):
    """Segments are compared across calls: those that go on are continued, all others start from nothing."""
    stack = _Stack(name)
    parts, state = stack.read_in_parts()
    whole = stack.whole(stack.x, UNIQUE)
    tolerance = 1e-4 * float(jnp.std(whole))
    is_real = DOCUMENTS != 0
    np.testing.assert_allclose(parts[is_real], whole[is_real], atol=tolerance)
    np.testing.assert_array_equal(state.segment, [9, 1])
    for row, start, stop in [(0, 0, 5), (0, 5, 8), (0, 8, 16), (1, 1, 5), (1, 7, 8), (1, 8, 16)]:
        x = jnp.roll(stack.x[row], -start, axis=0)
        alone = stack.whole(jnp.stack([x, x]), np.tile(np.arange(T) < stop - start, (2, 1)).astype(np.int32))
        np.testing.assert_allclose(parts[row, start:stop], alone[0, : stop - start], atol=tolerance)


@pytest.mark.parametrize("name", MIXERS)
def test_a_row_of_padding_and_an_empty_update_leave_a_state_as_it_is(name):
    stack = _Stack(name)
    _, state = stack.read_in_parts()
    _, after = stack.step(stack.x[:, :4], np.array([[9] * 4, [0] * 4], np.int32), state)
    for old, new in zip(jax.tree.leaves(state.runs), jax.tree.leaves(after.runs), strict=True):
        np.testing.assert_array_equal(np.asarray(old)[:, 1], np.asarray(new)[:, 1])
    update = empty_updates(*stack.sizes, jnp.float32, state)
    after = apply_updates(*stack.sizes, jnp.float32, state, update)
    jax.tree.map(np.testing.assert_array_equal, after, state)
