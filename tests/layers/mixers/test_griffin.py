"""RG-LRU and Griffin's recurrent block against the official vectors, packed, continued and decoded."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import GriffinRecurrentBlock, GriffinState, RGLRUState, rg_lru
from layers.mixers.griffin import _a_param_init
from layers.recurrences.rg_lru import sqrt_of_bounded_slope
from tests.support.carried_state import HALF, assert_state_is_carried
from tests.support.golden_cases import assert_golden_case, golden_case
from tests.support.inputs import Draw

PARAMS = "p__a_gate__b p__a_gate__w p__a_param p__a_imag_param p__input_gate__b p__input_gate__w"


def _segments(data):
    return jnp.cumsum(jnp.asarray(data["segment_pos"]) == 0, axis=1) if (data["segment_pos"] == 0).any() else None


@pytest.mark.parametrize("case", ["c1", "c4"])
def test_rg_lru_is_that_of_the_official_vectors(case):
    data = golden_case("rec_rglru", case)

    def gate(x, name):
        kernel = x[f"p__{name}__w"]  # [blocks, width, width]
        blocks = x["x"].reshape(*x["x"].shape[:2], *kernel.shape[:2])
        y = jnp.einsum("bthi,hij->bthj", blocks, kernel, precision="highest") + x[f"p__{name}__b"]
        return y.reshape(*x["x"].shape[:2], -1)

    def run(x):
        state = RGLRUState(x["h0"], jnp.ones(x["h0"].shape[0], bool)) if "h0" in x else None
        y, state = rg_lru(
            x["x"], gate(x, "input_gate"), gate(x, "a_gate"), x["p__a_param"],
            a_imag_param=x.get("p__a_imag_param"), initial_state=state, segment_ids=_segments(data))
        return y, state.h

    assert_golden_case(run, data, f"x h0 {PARAMS}", "o ht")


def _block(data):
    num_heads, block, _ = data["p__rg_lru__input_gate__w"].shape
    return GriffinRecurrentBlock(
        inner_width=num_heads * block, num_heads=num_heads, conv_taps=len(data["p__conv_1d__w"]))


def _block_params(x):
    official = {key.removeprefix("p__"): z for key, z in x.items()}
    gates = {ours: {"kernel": official[f"rg_lru__{theirs}__w"], "bias": official[f"rg_lru__{theirs}__b"]}
             for ours, theirs in {"input_gate": "input_gate", "recurrence_gate": "a_gate"}.items()}
    return gates | {
        "gate_proj": {"kernel": official["linear_y__kernel"]}, "gate_proj_bias": official["linear_y__bias"],
        "x_proj": {"kernel": official["linear_x__kernel"]}, "x_proj_bias": official["linear_x__bias"],
        "out": {"kernel": official["linear_out__kernel"]}, "out_bias": official["linear_out__bias"],
        "conv": {"kernel": official["conv_1d__w"], "bias": official["conv_1d__b"]},
        "a_param": official["rg_lru__a_param"],
    }


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_the_block_is_that_of_the_official_vectors(case):
    data = golden_case("rec_griffin_block", case)

    def run(x):
        state = None
        if "h0" in x:
            state = GriffinState(x["conv0"], RGLRUState(x["h0"], jnp.ones(x["h0"].shape[0], bool)))
        y, state = _block(data).apply({"params": _block_params(x)}, x["x"], _segments(data), state)
        return y, state.rg_lru.h, state.conv

    names = " ".join(key for key in data if key.startswith("p__"))
    assert_golden_case(run, data, f"x h0 conv0 {names}", "o ht convt")


def test_the_state_of_a_block_is_carried_and_segments_and_padding_keep_apart():
    data = golden_case("rec_griffin_block", "c0")
    params = _block_params({key: jnp.asarray(z) for key, z in data.items() if key.startswith("p__")})
    block, width = _block(data), data["x"].shape[2]

    def run(x, segment_ids, state):
        return block.apply({"params": params}, x, segment_ids, state)

    assert_state_is_carried(run, Draw(0)(2, 2 * HALF, width), block.empty_state(2, width))


def test_a_complex_state_is_carried_and_segments_and_padding_keep_apart():
    draw = Draw(1)
    a_param, a_imag_param = draw(3) - 2, draw(3)

    def run(x, segment_ids, state):
        return rg_lru(*x, a_param, a_imag_param=a_imag_param, initial_state=state, segment_ids=segment_ids)

    x = (draw(2, 2 * HALF, 6), draw(2, 2 * HALF, 3), draw(2, 2 * HALF, 3))
    assert_state_is_carried(run, x, RGLRUState.empty(2, 6))


def test_a_channel_that_keeps_all_has_a_finite_gradient():
    @jax.jit
    def slopes(x, a_param):
        of_block = jax.grad(lambda a: jnp.sum(rg_lru(*jnp.ones((3, 1, 4, 1)), a)[0]))
        return jax.grad(sqrt_of_bounded_slope)(x), of_block(a_param)

    slope, gradient = slopes(0.0, jnp.full(1, -200.0))
    assert float(slope) == pytest.approx(1000) and np.isfinite(gradient).all()


def test_the_block_starts_with_long_memories():
    radius = np.exp(-np.logaddexp(0, _a_param_init(jax.random.key(0), (64,))))
    assert 0.9 <= radius.min() < 0.92 and 0.98 < radius.max() <= 0.999


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="inner_width 16 is not a multiple of num_heads 3"):
        jax.eval_shape(GriffinRecurrentBlock(num_heads=3).init, jax.random.key(0), np.zeros((1, 1, 16)))
    with pytest.raises(ValueError, match=r"x has width 6, which must be 1 x 3.* needs a_imag_param"):
        rg_lru(np.zeros((1, 2, 6)), np.zeros((1, 2, 3)), np.zeros((1, 2, 3)), np.zeros(3))
