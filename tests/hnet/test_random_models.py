"""Random models on random input: layouts of 0 to 3 chunking stages, any router, policy and capacity.

Boundaries of the learned router are compared only where no probability is within MARGIN of 1/2.
"""
import dataclasses
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from hnet import HNetConfig, StageConfig
from tests.support.assertions import GOLDEN_LOGITS_ERROR, SAME_COMPUTATION
from tests.support.models import MARGIN, compiled_with_state, make_stage, random_params, stepped_logits

ROWS, VOCAB = 3, 256
COMMON = dict(num_heads=2, rotary_width=4, feed_forward_width=8, state_size=4, head_width=8)


class Case(NamedTuple):
    config: HNetConfig
    seed: int
    tokens: np.ndarray
    segment_ids: np.ndarray


@st.composite
def stages(draw, *, is_outermost: bool, width: int, policies: list[str]) -> StageConfig:
    letters = st.sampled_from(["t1", "m1", "T1", "M1"])
    overflow = draw(st.sampled_from(policies))
    return make_stage(
        width=width, encoder=draw(letters), decoder=draw(letters), window=draw(st.sampled_from([None, 2])),
        router=draw(st.sampled_from(["learned", "learned", "stride", *(["space"] if is_outermost else [])])),
        router_stride=draw(st.integers(2, 4)),
        downsampler=draw(st.sampled_from(["first", "mean", "max"])),
        upsampler=draw(st.sampled_from(["smooth", "smooth_tokens", "none"])),
        capacity=draw(st.sampled_from([0.3, 0.6, 1.0])), overflow=overflow,
        packed=overflow != "merge" and draw(st.booleans()), **COMMON)


@st.composite
def cases(draw) -> Case:
    num_chunking = draw(st.integers(0, 3))
    widths = sorted(draw(st.lists(st.sampled_from([8, 16]), min_size=num_chunking + 1, max_size=num_chunking + 1)))
    chunking: list[StageConfig] = []
    for index in range(num_chunking):
        # Within these, what "merge" keeps would depend on other rows: the config refuses it.
        is_shared = any(
            stage.chunking.packed or stage.chunking.grows for stage in chunking)
        policies = ["error", "grow"] if is_shared else ["error", "grow", "merge"]
        chunking.append(draw(stages(is_outermost=index == 0, width=widths[index], policies=policies)))
    inner = make_stage(width=widths[-1], encoder=draw(st.sampled_from(["t1", "m1"])), **COMMON)
    length, seed = draw(st.integers(1, 13)), draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    lines = [rng.choice(np.frombuffer(b"ab  \n0_\xc3\xbc", np.uint8), length) for _ in range(ROWS)]
    ids = np.stack([_segments(draw, length) for _ in range(ROWS)])
    return Case(HNetConfig(stages=(*chunking, inner), vocab_size=VOCAB), seed, np.int32(lines), ids)


def _segments(draw, length: int) -> np.ndarray:
    """A row of segments with padding anywhere: empty, one document or several."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
    ids = np.zeros(length, np.int32)
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, length], strict=True), start=1):
        ids[start:stop] = number * draw(st.sampled_from([0, 1, 1, 1]))
    return ids


def check(case: Case) -> None:
    config, (length, ones) = case.config, (case.tokens.shape[1], np.ones_like(case.tokens))
    params = random_params(config, case.seed)
    run = compiled_with_state(config)

    def whole(tokens, ids):
        return run(params, tokens, ids, None, None)

    output, unsegmented = whole(case.tokens, case.segment_ids), whole(case.tokens, ones)
    hypothesis.assume(all(
        (np.abs(np.asarray(stage.boundary_prob)[np.asarray(stage.is_real)] - 0.5) > MARGIN).all()
        for each in (output, unsegmented) for stage in each.stages.values()))

    # Overflow is reported when and only when it happened, and makes NaN when and only when it is an error.
    is_error = [stage.chunking.overflow == "error" for stage in config.stages]
    over = np.zeros(ROWS, bool)
    inner_error = False
    for index, stage in enumerate(output.stages.values()):
        count, num_over = int(stage.boundary_mask.sum()), np.asarray(stage.num_overflow)
        slots = int(stage.num_slots) * (1 if config.stages[index].chunking.packed else num_over.shape[0])
        assert num_over.sum() <= count
        if count - num_over.sum() > slots or (count <= int(stage.num_slots) and num_over.any()):
            raise AssertionError(f"stage{index}: {count} boundaries, {num_over} past {int(stage.num_slots)} slots")
        if config.stages[index].chunking.overflow == "grow":
            assert (num_over == 0).all()
        if is_error[index] and num_over.any():
            over, inner_error = (over | (num_over > 0), inner_error) if num_over.shape[0] == ROWS else (over, True)
    real = case.segment_ids != 0
    if not over.any() and not inner_error:
        assert np.isfinite(np.asarray(output.logits)[real]).all()
    assert not np.isfinite(output.logits[over]).any()
    if over.any() or inner_error:
        return

    # Causality, and independence of what stands in padding.
    changed = case.tokens.copy()
    changed[:, -1] = 97 + (changed[:, -1] == 97)
    changed = np.where(real, changed, 98)
    after = np.asarray(whole(changed, case.segment_ids).logits)
    earlier = real & (np.arange(length) < length - 1)
    same = np.where(earlier, np.abs(after - output.logits).max(-1), 0)
    assert not same.max() > SAME_COMPUTATION or not np.isfinite(after).all()

    def loss(params):
        outputs = run(params, case.tokens, case.segment_ids, None, None)
        return jnp.sum(jnp.where(real[..., None], outputs.logits, 0) ** 2) + sum(
            stage.ratio_loss(3.0) for stage in outputs.stages.values())

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))

    # Token by token, which knows no packing and no growing.
    if length > 1 and np.isfinite(unsegmented.logits).all():
        stepped = stepped_logits(config, params, case.tokens, prompt_lengths=(1, length // 2, length - 1)[:ROWS])
        np.testing.assert_allclose(stepped, unsegmented.logits, atol=GOLDEN_LOGITS_ERROR)

    # Packed documents equal separate rows, where slots are not rationed by the row.
    exact = dataclasses.replace(config).at_full_capacity()
    if real[0].any():
        alone = np.where(case.segment_ids == case.segment_ids[0][real[0]][-1], case.segment_ids, 0)
        alone[1:] = 0
        run_exact = compiled_with_state(exact)
        together, apart = (np.asarray(run_exact(params, case.tokens, ids, None, None).logits)[0]
                           for ids in (case.segment_ids, alone))
        np.testing.assert_allclose(together[alone[0] != 0], apart[alone[0] != 0], atol=SAME_COMPUTATION)


# Each example compiles programs of its own: making a failing one smaller would take an hour.
SETTINGS = dict(deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck))


@hypothesis.settings(max_examples=1, **SETTINGS)
@hypothesis.given(cases())
def test_a_random_model(case):
    check(case)


@pytest.mark.slow
@hypothesis.settings(max_examples=40, **SETTINGS)
@hypothesis.given(cases())
def test_many_random_models(case):
    check(case)
