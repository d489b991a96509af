import dataclasses
import json

import pytest

from hnet import HNetConfig, StageConfig, from_official_json
from hnet.layout import parse_layout
from tests.support.models import make_stage, two_stage_config

OFFICIAL = {
    "arch_layout": ["m4", ["T1m4", ["T26"], "m4T1"], "m4"], "d_model": [1024, 1024, 1536],
    "d_intermediate": [0, 2816, 4096], "vocab_size": 256, "tie_embeddings": False,
    "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 128, "expand": 2},
    "attn_cfg": {"num_heads": [16, 16, 16], "rotary_emb_dim": [32, 32, 48], "window_size": [1023, 1023, -1]},
}


def test_a_context_holds_at_least_one_token():
    stage = make_stage(width=16, encoder="m1", state_size=8, head_width=16)
    assert HNetConfig(stages=(stage,)).context_length is None
    with pytest.raises(ValueError, match="context_length 0 must be at least 1, or None for no limit"):
        HNetConfig(stages=(stage,), context_length=0)


def test_reads_the_official_json():
    config = from_official_json(json.dumps(OFFICIAL))
    assert [stage.stack.width for stage in config.stages] == [1024, 1024, 1536]
    assert [(stage.encoder, stage.decoder) for stage in config.stages] == [
        ("m4", "m4"), ("T1m4", "m4T1"), ("T26", "")]
    assert parse_layout(config.stages[1].encoder) == (("T", 1), ("m", 4))
    assert [stage.stack.attention.window for stage in config.stages] == [1023, 1023, None]
    assert all(stage.chunking.capacity == 1 for stage in config.stages) and config.dtype == "float32"


def test_official_values_may_be_shared_and_feed_forward_widths_are_rounded_up():
    shared = OFFICIAL | {"d_intermediate": [0, 100, 129], "attn_cfg": {
        "num_heads": 16, "rotary_emb_dim": 32, "window_size": -1}}
    config = from_official_json(json.dumps(shared), dtype="bfloat16", capacity=0.5)
    assert [stage.stack.attention.num_heads for stage in config.stages] == [16, 16, 16]
    assert [stage.stack.feed_forward_width for stage in config.stages] == [0, 128, 256]
    assert config.dtype == "bfloat16" and config.stages[0].chunking.capacity == 0.5


def test_a_model_without_hierarchy_has_one_stage():
    config = from_official_json(json.dumps(OFFICIAL | {
        "arch_layout": ["T24"], "d_model": [1024], "d_intermediate": [2816]}))
    assert len(config.stages) == 1 and config.stages[0].decoder == ""


@pytest.mark.parametrize(("fields", "message"), [
    (dict(encoder="T2", num_heads=3, feed_forward_width=8), "attention.num_heads 3 must divide width 64"),
    (dict(encoder="T2", num_heads=4), "set feed_forward_width"),
    (dict(encoder="t2", num_heads=4, rotary_width=18), "rotary_width 18 must be even and at most .* 16"),
    (dict(encoder="m2", head_width=48), "not a multiple of recurrence.head_width 48"),
    (dict(encoder="m2x1"), "layout 'm2x1' must be names of mixers"),
    (dict(encoder="m0"), "layout 'm0' must be names of mixers"),
    (dict(state_size=0), "recurrence.state_size 0 must be at least 1"),
    (dict(capacity=0.0), "capacity 0.0 is a fraction"),
    (dict(window=-2), "attention.window -2 must be"),
])
def test_a_stage_refuses_values_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        make_stage(width=64, **fields)


@pytest.mark.parametrize(("stages", "message"), [
    ((), "at least one stage"),
    ((make_stage(width=64, decoder="m4"),), "stage0 is innermost"),
    ((make_stage(width=64), make_stage(width=64)), "stage0.decoder is empty"),
    ((make_stage(width=128, decoder="m4"), make_stage(width=64)), "narrower going inward"),
    ((make_stage(width=64, encoder=""),), "stage0.encoder is empty"),
])
def test_a_model_refuses_stages_that_do_not_nest(stages, message):
    with pytest.raises(ValueError, match=message):
        HNetConfig(stages=stages)


def test_configs_are_hashable_and_frozen():
    config = two_stage_config()
    assert hash(config) == hash(two_stage_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3


ATTENTION = dict(width=16, encoder="t1", num_heads=2)
INNERMOST = make_stage(**ATTENTION)


def _chunking(**fields) -> StageConfig:
    return make_stage(**ATTENTION, decoder="t1", **fields)


@pytest.mark.parametrize(("fields", "message"), [
    (dict(router="spaces"), "router 'spaces' is not one of learned, stride, space, entropy, given"),
    (dict(overflow="drop"), "overflow 'drop' is not one of error, grow, merge"),
    (dict(router="stride", router_stride=1), "router_stride 1 must be at least 2"),
    (dict(capacity=0.5, overflow="grow", grow_to=(0.4, 1.0)), "must rise from above capacity 0.5 to 1"),
    (dict(capacity=0.5, overflow="grow", grow_to=(0.7,)), "must rise from above capacity 0.5 to 1"),
    (dict(capacity=0.5, packed=True), "set overflow to 'error' or 'grow'"),
])
def test_ways_to_chunk_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        _chunking(**fields)


@pytest.mark.parametrize(("stages", "model", "message"), [
    ((_chunking(), _chunking(router="space"), INNERMOST), {}, "stage1.chunking.router 'space' looks at bytes"),
    ((_chunking(router="entropy"), INNERMOST), {}, "boundary_lm must be given"),
    ((_chunking(), INNERMOST), dict(boundary_lm=HNetConfig(stages=(INNERMOST,))), "boundary_lm must be given"),
    ((_chunking(router="entropy"), INNERMOST), dict(boundary_lm=HNetConfig(stages=(INNERMOST,), vocab_size=9)),
     "boundary_lm.vocab_size 9 must be vocab_size 256"),
    ((_chunking(upsampler="none"), INNERMOST), dict(bfloat16_dechunk=True), "set every upsampler to 'smooth'"),
    ((_chunking(capacity=0.5, overflow="grow"), _chunking(capacity=0.5), INNERMOST), {},
     "stage1.chunking.overflow 'merge'"),
    ((_chunking(packed=True), _chunking(), _chunking(capacity=0.5), INNERMOST), {},
     "stage2.chunking.overflow 'merge'"),
])
def test_a_model_refuses_stages_that_do_not_go_together(stages, model, message):
    with pytest.raises(ValueError, match=message):
        HNetConfig(stages=stages, **model)


def test_a_boundary_lm_gets_its_full_capacity_too():
    lm = HNetConfig(stages=(_chunking(capacity=0.5), INNERMOST))
    config = HNetConfig(stages=(_chunking(router="entropy", capacity=0.5), INNERMOST), boundary_lm=lm)
    full = config.at_full_capacity()
    assert full.stages[0].chunking.capacity == full.boundary_lm.stages[0].chunking.capacity == 1
