"""One function for all callers: every implementation under every kind of mask, against plain sums in float64."""
import dataclasses
import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import (
    CAUSAL,
    SAME_SEGMENT,
    Attended,
    Bits,
    BlockLists,
    Causal,
    Mask,
    SameSegment,
    Window,
    attend,
    merge,
    token_info,
)
from layers.attention.blockwise import attend_blockwise
from layers.attention.mask import pairs
from tests.support.assertions import assert_matches
from tests.support.block_sparse_cases import Case, draw_inputs, in_float32, values_and_gradients
from tests.support.inputs import Draw

attend_module = importlib.import_module("layers.attention.attend")
DEFAULT = CAUSAL & SAME_SEGMENT
GLOBALS = CAUSAL & SAME_SEGMENT & (Window(4) | Bits())
SMALL = dict(t=33, s=33, width=8, value_width=8, block_q=8, block_k=8, density=0.8)
CASES = {
    "default": Case(),
    "segments and padding": Case(segments=True),
    "all_of_a_segment": Case(mask=SAME_SEGMENT, segments=True),
    "causal across segments": Case(mask=CAUSAL, segments=True),
    "window": Case(window=5, segments=True),
    "window of itself": Case(window=0),
    "window on both sides": Case(mask=Window(6), segments=True),
    "bits": Case(mask=Bits(), bits=True, segments=True),
    "window or bits": Case(mask=GLOBALS, bits=True, segments=True),
    "segment or bits": Case(mask=CAUSAL & (SAME_SEGMENT | Bits()), bits=True, segments=True),
    "positions": Case(positions=True, window=30),
    "positions per key head": Case(positions=True, token_heads=2, window=30),
    "more keys than queries": Case(t=9, offset=24, heads=6),
    "key bias": Case(key_bias=True, segments=True),
    "key bias, softcap, sinks": Case(key_bias=True, softcap=2.0, sinks=True, segments=True, heads=2, lists=1),
    "softcap and scale": Case(softcap=2.0, scale=0.7),
    "sinks": Case(sinks=True, mask=GLOBALS, bits=True),
    "wider values": Case(value_width=12),
    "nothing visible": Case(mask=CAUSAL & Window(2), offset=90, key_bias=True),
}
CASES = {name: dataclasses.replace(case, **{
    key: value for key, value in SMALL.items() if getattr(case, key) == getattr(Case(), key)})
    for name, case in CASES.items()}
RUNS = {  # implementation, whether lists of blocks are given, other arguments
    "dense reference": ("reference", False, {}), "dense xla": ("xla", False, {}),
    "dense blockwise": ("blockwise", False, {}),
    "reference": ("reference", True, {}), "xla": ("xla", True, {}),
    "pallas_tpu": ("pallas_tpu", True, {"interpret": True}),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Cuts rows as short as those here into several blocks, of which the last is not whole."""
    monkeypatch.setattr(attend_module, "attend_blockwise", functools.partial(attend_blockwise, block=8))


def _exact(case: Case, dense: bool):
    """Values and gradients in float64, by autodiff of the definition."""
    inputs = draw_inputs(dataclasses.replace(case, dense=dense))
    groups = case.heads // case.key_heads
    kv_tokens = inputs.q_tokens if inputs.kv_tokens is None else inputs.kv_tokens
    allowed = np.asarray(pairs(inputs.mask, inputs.q_tokens, kv_tokens))
    allowed = np.repeat(allowed, case.heads // allowed.shape[1], axis=1)
    if not dense:
        listed = np.asarray(inputs.blocks.to_dense())
        listed = np.repeat(np.repeat(listed, case.block_q, axis=2), case.block_k, axis=3)
        listed = listed[:, :, : case.t, : case.s]
        allowed = allowed & np.repeat(listed, case.heads // listed.shape[1], axis=1)
    allowed = np.broadcast_to(allowed, (case.b, case.heads, case.t, case.s))
    sees_any = allowed.any(axis=-1)

    def loss(q, k, v, key_bias, sinks):
        scores = jnp.einsum("bthk,bshk->bhts", q, jnp.repeat(k, groups, 2))
        scores *= case.scale or case.width ** -0.5
        if case.softcap:
            scores = case.softcap * jnp.tanh(scores / case.softcap)
        if key_bias is not None:
            scores += jnp.repeat(key_bias, groups, 1)[:, :, None]
        weights = jnp.where(allowed, jnp.exp(scores), 0)
        total = jnp.sum(weights, axis=-1)
        if sinks is not None:
            total += jnp.exp(sinks)[:, None]
        is_seen = sees_any | (sinks is not None)
        total = jnp.where(is_seen, total, 1)
        o = jnp.einsum("bhts,bshv->bthv", weights / total[..., None], jnp.repeat(v, groups, 2))
        lse = jnp.where(is_seen, jnp.log(total), 0)
        return jnp.sum(o * inputs.do) + jnp.sum(jnp.where(is_seen, lse * inputs.dlse, 0)), {"o": o, "lse": lse}

    with jax.enable_x64(True):
        operands = [None if x is None else jnp.asarray(x, jnp.float64) for x in (
            inputs.q, inputs.k, inputs.v, inputs.key_bias, inputs.sinks)]
        which = tuple(index for index, x in enumerate(operands) if x is not None)
        (_, values), found = jax.jit(jax.value_and_grad(loss, which, has_aux=True))(*operands)
    gradients = dict(zip(which, found, strict=True))
    return jax.tree.map(np.asarray, (values, [gradients.get(index) for index in range(5)]))


_exact = functools.cache(_exact)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_definition(name, run):
    implementation, has_blocks, options = RUNS[run]
    case = CASES[name]
    inputs = draw_inputs(dataclasses.replace(case, dense=not has_blocks))
    if implementation == "pallas_tpu" and (case.key_bias or case.token_heads > 1):
        with pytest.raises(NotImplementedError, match=r"key_bias is not among|positions differ from key head"):
            values_and_gradients(inputs, implementation=implementation, **options)
        return
    values, gradients, sees_nothing = values_and_gradients(inputs, implementation=implementation, **options)
    expected_values, expected_gradients = _exact(case, not has_blocks)
    if name == "nothing visible":
        assert sees_nothing.all() and not any(np.any(x) for x in jax.tree.leaves((values["o"], gradients)))
        return
    assert_matches(values, expected_values, dtype="float32", scale=2)
    assert_matches(list(gradients), expected_gradients, dtype="float32", scale=2)


@pytest.mark.parametrize(("implementation", "dtype"), [
    ("xla", "float32"), ("xla", "bfloat16"), ("tokamax", "float32"), ("tokamax", "bfloat16"),
    ("cudnn", "bfloat16")])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("t", [1, 7, 64])
def test_dense_implementations_match_the_reference(t, window, implementation, dtype):
    if implementation == "tokamax":
        pytest.importorskip("tokamax")
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs an NVIDIA GPU")
    inputs = draw_inputs(
        Case(t=t, s=t, heads=3, key_heads=3, window=window, segments=True, dense=True, dtype=dtype))
    expected, expected_gradients, _ = values_and_gradients(in_float32(inputs), implementation="reference")
    actual, gradients, _ = values_and_gradients(inputs, implementation=implementation)
    assert actual["o"].dtype == jnp.dtype(dtype)
    # bfloat16 probabilities are a second rounding; their gradients a third and fourth.
    scale = 2 if dtype == "bfloat16" else 1
    assert_matches(actual, expected, dtype=dtype, scale=scale)
    assert_matches(gradients, expected_gradients, dtype=dtype, scale=2 * scale)


def test_dense_attention_is_that_of_jax_nn_to_the_last_bit():
    """With keys of their own tokens and nothing else asked for; so runs made before `attend` repeat."""
    inputs = draw_inputs(Case(segments=True, dense=True, heads=2))
    is_real = (inputs.q_tokens.segment != 0)[:, 0, :, None, None]
    q, k, v = (jnp.where(is_real, x, 0) for x in (inputs.q, inputs.k, inputs.v))

    @jax.jit
    def ours(q, k, v):
        return attend(q, k, v, q_tokens=inputs.q_tokens).o

    @jax.jit
    def theirs(q, k, v):
        mask = pairs(DEFAULT, inputs.q_tokens, inputs.q_tokens)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return jnp.where(jnp.any(mask, axis=-1)[:, 0, :, None, None], y, 0)

    np.testing.assert_array_equal(ours(q, k, v), theirs(q, k, v))


@pytest.mark.parametrize("run", RUNS)
def test_nothing_that_padding_holds_matters(run):
    """NaN in padded queries, keys, values and biases: results and gradients are those over zeros."""
    implementation, has_blocks, options = RUNS[run]
    case = Case(segments=True, key_bias=implementation != "pallas_tpu", dense=not has_blocks, **SMALL)
    inputs = draw_inputs(case)
    is_padding = np.asarray(inputs.q_tokens.segment == 0)[:, 0]
    assert 0 < is_padding.sum() < is_padding.size

    def fill(value):
        def filled(x, axis):
            at = is_padding.reshape([case.b] + [case.t if a == axis else 1 for a in range(1, x.ndim)])
            return jnp.where(at, value, x)

        key_bias = None if inputs.key_bias is None else filled(inputs.key_bias, 2)
        q, k, v = (filled(x, 1) for x in (inputs.q, inputs.k, inputs.v))
        return inputs.replace(q=q, k=k, v=v, key_bias=key_bias)

    expected, poisoned = (values_and_gradients(fill(value), implementation=implementation, **options)
                          for value in (0.0, jnp.nan))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(poisoned))
    jax.tree.map(np.testing.assert_array_equal, poisoned, expected)


def test_foreign_keys_do_not_matter_however_large():
    inputs = draw_inputs(Case(segments=True, dense=True, **SMALL))
    tokens = inputs.q_tokens
    is_last = (tokens.segment == jnp.max(tokens.segment, axis=2, keepdims=True))[:, 0, :, None, None]

    def run(scale):
        k, v = (jnp.where(is_last, scale * x, x) for x in (inputs.k, inputs.v))
        return jnp.where(is_last, 0, attend(inputs.q, k, v, q_tokens=tokens).o)

    np.testing.assert_array_equal(run(1.0), run(1e30))


@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """A mask that nobody has heard of."""

    step: int

    def allowed(self, q, kv):
        return (q.position - kv.position) % self.step == 0


@dataclasses.dataclass(frozen=True)
class FirstHalf(Mask):
    """A mask that knows which blocks to leave out."""

    length: int

    def allowed(self, q, kv):
        return kv.position < self.length // 2

    def bounds(self, q, kv):
        return kv.first_position < self.length // 2, kv.last_position < self.length // 2


@pytest.mark.parametrize("mask", [DEFAULT & Dilated(3), DEFAULT & FirstHalf(32), Dilated(2) | FirstHalf(32)])
def test_a_mask_of_ones_own_works_dense_and_with_blocks(mask):
    draw = Draw(0)
    q, k, v = draw(1, 32, 2, 8), draw(1, 32, 2, 8), draw(1, 32, 2, 8)
    tokens = token_info(32)
    blocks = BlockLists.from_mask(mask, tokens, block_q=8, block_k=8)
    assert not isinstance(mask, FirstHalf) or blocks.ids.shape[-1] == 2
    dense = attend(q, k, v, mask=mask).o
    sparse = attend(q, k, v, mask=mask, blocks=blocks, implementation="xla").o
    assert_matches(sparse, dense, dtype="float32", scale=2)
    assert_matches(attend(q, k, v, mask=mask, implementation="reference").o, dense, dtype="float32", scale=2)
    with pytest.raises(NotImplementedError, match=r"the mask has (Dilated|FirstHalf); kernels evaluate Causal"):
        attend(q, k, v, mask=mask, blocks=blocks, implementation="pallas_tpu", interpret=True)


def test_masks_are_values_that_compare_and_hash_by_what_they_say():
    assert Causal() & SameSegment() & Window(3) == CAUSAL & (SAME_SEGMENT & Window(3))
    assert len({CAUSAL & Window(3), Causal() & Window(3), CAUSAL & Window(4), CAUSAL | Window(3)}) == 3


@pytest.mark.parametrize("num_branches", [1, 2, 3])
def test_branches_merge_to_attention_over_the_union_with_finite_gradients(num_branches):
    """Also where no branch sees anything: padding, and queries before all keys."""
    inputs = draw_inputs(Case(segments=True, dense=True, offset=-8, t=33, s=33))
    part = jnp.arange(33) % num_branches

    def branches(q, k, v):
        for index in range(num_branches):
            keys = inputs.kv_tokens._replace(segment=jnp.where(part == index, inputs.kv_tokens.segment, 0))
            yield attend(q, k, v, q_tokens=inputs.q_tokens, kv_tokens=keys)

    def of_whole(q, k, v):
        return attend(q, k, v, q_tokens=inputs.q_tokens, kv_tokens=inputs.kv_tokens, implementation="reference")

    def value_and_gradients(function):
        def both(*x):
            o, lse = function(*x)
            return o, jnp.where(lse > -jnp.inf, lse, 0)

        values, pull_back = jax.vjp(both, inputs.q, inputs.k, inputs.v)
        return values, pull_back((inputs.do, inputs.dlse))

    merged = jax.jit(lambda: value_and_gradients(lambda *x: merge(*branches(*x))))()
    whole = jax.jit(lambda: value_and_gradients(of_whole))()
    assert_matches(merged, whole, dtype="float32", scale=4)


def test_a_merge_of_nothing_is_nothing_and_pulls_on_nothing():
    """The log-sum-exp of the merge too: its gradient would be that of -inf - -inf."""
    blind = Attended(jnp.zeros((1, 2, 1, 4)), jnp.full((1, 1, 2), -jnp.inf))
    (o, lse), pull_back = jax.vjp(lambda *branches: tuple(merge(*branches)), blind, blind)
    assert not np.any(o) and (lse == -jnp.inf).all()
    assert not any(np.any(x) for x in jax.tree.leaves(pull_back((jnp.ones_like(o), jnp.ones_like(lse)))))


def test_arguments_that_do_not_fit_are_refused():
    q, tokens = jnp.zeros((2, 8, 2, 4)), token_info(8)
    with pytest.raises(TypeError, match="parameter 'k'"):
        attend(q, q[:1], q)
    with pytest.raises(ValueError, match="q has 3 heads, which is not a multiple of the 2 heads of k and v"):
        attend(jnp.zeros((2, 8, 3, 4)), q, q)
    with pytest.raises(ValueError, match="q_tokens is given for 4 queries; give kv_tokens for the 8 keys too"):
        attend(q[:, :4], q, q, q_tokens=token_info(4))
    with pytest.raises(ValueError, match=r"q_tokens.position has shape \[1, 1, 7\]; \[2, 2, 8\] fits"):
        attend(q, q, q, q_tokens=token_info(7))
    with pytest.raises(ValueError, match=r"the mask has Bits, and q_tokens\.bits is None"):
        attend(q, q, q, mask=CAUSAL & Bits(), q_tokens=tokens)
    with pytest.raises(ValueError, match="window -1 must be at least 0; leave Window out"):
        Window(-1)


def test_an_implementation_that_lacks_a_case_says_which(monkeypatch):
    q = jnp.zeros((1, 8, 2, 4))
    with pytest.raises(NotImplementedError, match='"pallas_tpu" is not for attention without blocks'):
        attend(q, q, q, implementation="pallas_tpu")
    blocks = BlockLists.from_mask(CAUSAL, token_info(8), block_q=8, block_k=8)
    with pytest.raises(NotImplementedError, match='"cudnn" is not for attention with blocks'):
        attend(q, q, q, blocks=blocks, implementation="cudnn")
    with pytest.raises(NotImplementedError, match='"cudnn": a key_bias and a softcap are not passed on to it'):
        attend(q, q, q, softcap=2.0, key_bias=jnp.zeros((1, 2, 8)), implementation="cudnn")
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(NotImplementedError, match='implementation="tokamax" needs that package'):
        attend(q, q, q, implementation="tokamax")
