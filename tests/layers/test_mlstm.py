"""mLSTM against the official vectors; its running maximum, its range, and the memory it is continued from."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import MLSTM, MLSTMMemory, mlstm
from layers.mlstm import empty_memory
from layers.running_max import NOTHING, _associative, _sequential
from tests.assertions import assert_matches
from tests.carried_state import HALF, assert_state_is_carried
from tests.golden_cases import assert_golden_case, golden_case
from tests.inputs import Draw

# h is a quotient by n . q, in these cases a small difference of large terms: the equations stepped in float32 are
# 4e-6 from these float64 vectors as well, in o and in the gradients, while the states are within 2e-7.
DIVISION_LIMIT = 8e-6


def _run(x, **options):
    state = None
    if "h0_0" in x:
        state = MLSTMMemory(x["h0_0"], x["h0_1"], x["h0_2"][..., 0])
    h, memory = mlstm(x["q"], x["k"], x["v"], x["i"], x["f"], initial_state=state, **options)
    return h, *memory


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_exponential_gates_are_those_of_the_official_vectors(case):
    data = golden_case("rec_mlstm", case)
    assert_golden_case(_run, data, "q k v i f h0_0 h0_1 h0_2", "o ht0 ht1 ht2", limit=DIVISION_LIMIT)


def test_sigmoid_gates_are_those_of_the_official_vectors():
    data = golden_case("rec_mlstm", "c2")
    assert_golden_case(lambda x: _run(x, input_activation="sigmoid")[:1], data, "q k v i f")


def test_the_running_maximum_is_one_of_its_two_forms():
    draw = Draw(1)
    x, f, initial = 10 * draw(2, 37, 3), -(draw(2, 37, 3) ** 2), draw(2, 3)
    f, x = f.at[0, 5].set(NOTHING), x.at[1, 7].set(NOTHING)
    np.testing.assert_allclose(
        jax.jit(_associative)(x, f, initial), jax.jit(_sequential)(x, f, initial), rtol=1e-5, atol=1e-5)


def _tokens(length):
    draw = Draw(length)
    x = {"q": draw(2, length, 1, 4), "k": draw(2, length, 1, 4), "v": draw(2, length, 2, 5)}
    return x | {"i": 3 * draw(2, length, 2), "f": 3 * draw(2, length, 2)}


def test_memory_is_carried_and_segments_and_padding_keep_apart():
    def run(x, segment_ids, memory):
        return mlstm(*x, initial_state=memory, segment_ids=segment_ids)

    assert_state_is_carried(run, tuple(_tokens(2 * HALF).values()), empty_memory(2, 2, 4, 5), scale=16)


def test_each_segment_may_have_a_memory_of_its_own():
    x, ids = _tokens(9), jnp.asarray([[3] * 4 + [0, 0] + [5] * 3] * 2, jnp.int32)
    one_each = jax.tree.map(lambda z: jnp.stack([z, z], axis=1), empty_memory(2, 2, 4, 5))
    h, memory = jax.jit(mlstm)(*x.values(), initial_state=one_each, segment_ids=ids)
    expected, last = jax.jit(mlstm)(*x.values(), segment_ids=ids)
    assert_matches((h, jax.tree.map(lambda z: z[:, 1], memory)), (expected, last), dtype="float32", scale=16)


def test_gates_beyond_the_range_of_an_exponential_leave_outputs_and_gradients_finite():
    @jax.jit
    def values_and_gradients(x):
        h, pull_back = jax.vjp(lambda x: _run(x)[0], x)
        return h, pull_back(jnp.ones_like(h))

    for gate in (-300.0, 300.0):
        x = _tokens(9) | {"i": jnp.full((2, 9, 2), gate), "f": jnp.full((2, 9, 2), gate)}
        h, gradients = values_and_gradients(x)
        assert all(np.isfinite(z).all() for z in jax.tree.leaves((h, gradients)))
        assert h.any() == (gate > 0)  # with both gates shut nothing is written


def test_the_layer_carries_its_memory_and_segments_and_padding_keep_apart():
    layer, x = MLSTM(state_size=3, expand=2, head_width=5, init_std=0.5, out_init_std=0.5), Draw(0)(2, 2 * HALF, 5)
    params = jax.jit(layer.init)(jax.random.key(0), x)

    def run(x, segment_ids, memory):
        return layer.apply(params, x, segment_ids, memory)

    assert_state_is_carried(run, x, layer.empty_state(2, 5), scale=16)
    with pytest.raises(ValueError, match="expand \\* width = 10 is not a multiple of head_width 4"):
        MLSTM(expand=2, head_width=4).empty_state(1, 5)
