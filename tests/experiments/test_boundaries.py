import jax
import numpy as np
import pytest

from experiments.boundaries import byte_boundaries, chunk_texts
from experiments.config import DataConfig, RunConfig
from experiments.data import BOS
from hnet import HNetConfig, HNetLM, StageConfig
from tests.assertions import SAME_COMPUTATION
from tests.hnet.models import random_params

SIZE = 32
TEXT = np.random.default_rng(0).bytes(131)  # some of it is no UTF-8


@pytest.fixture(scope="module")
def model():
    """(config, params) of a model that cuts at random; its capacity while training would be too small here."""
    stage = dict(width=16, capacity=0.25, num_heads=2, rotary_width=8)
    stages = (StageConfig(encoder="t1", decoder="t1", **stage), StageConfig(encoder="t1", decoder="t1", **stage),
              StageConfig(encoder="t1", decoder="", **stage))
    config = RunConfig(
        model=HNetConfig(stages=stages), data=DataConfig(sequence_length=SIZE), tokens_per_chunk=(2.0, 2.0))
    return config, random_params(config.model)


@pytest.fixture(scope="module")
def chunked(model):
    """TEXT as a whole, its first bytes up to one window with BOS, and fewer."""
    config, params = model
    return chunk_texts(config, params, [("long", TEXT), ("window", TEXT[: SIZE - 1]), ("short", TEXT[:20])])


@pytest.fixture(scope="module")
def direct(model):
    """The model run on stream positions start to start + SIZE: what byte_boundaries makes of it."""
    config, params = model
    full = HNetConfig.from_dict(config.model.to_dict() | {"stages": {
        name: stage | {"capacity": 1.0} for name, stage in config.model.to_dict()["stages"].items()}})
    run = jax.jit(HNetLM(full).apply)
    stream = np.frombuffer(bytes([BOS]) + TEXT, np.uint8).astype(np.int32)
    return lambda start: run({"params": params}, stream[None, start : start + SIZE])


def _check(chunked, output, bytes_read: slice, window_start: int) -> None:
    """Compares some bytes of a text with a run on one window: position i + 1 - window_start is byte i."""
    read = slice(bytes_read.start + 1 - window_start, bytes_read.stop + 1 - window_start)
    inner_positions = np.arange(SIZE)
    for stage in chunked.stages:
        seen = output.stages[stage.name]
        mask = np.asarray(seen.mask[0])
        prob, boundary = np.full(SIZE, np.nan), np.zeros(SIZE, bool)
        prob[inner_positions] = np.asarray(seen.boundary_prob[0])[mask]
        boundary[inner_positions] = np.asarray(seen.boundary_mask[0])[mask]
        inner_positions = np.flatnonzero(boundary)
        np.testing.assert_allclose(stage.boundary_prob[bytes_read], prob[read], atol=SAME_COMPUTATION)
        np.testing.assert_array_equal(stage.is_boundary[bytes_read], boundary[read])


def test_a_text_of_one_window_has_the_boundaries_of_a_single_run(chunked, direct):
    _, window, short = chunked
    _check(window, direct(0), slice(0, SIZE - 1), window_start=0)
    _check(short, direct(0), slice(0, 20), window_start=0)  # causal: the padding behind it does not matter
    assert len(short.stages[0].is_boundary) == 20 and short.text == TEXT[:20]


def test_a_long_text_is_read_from_windows_that_overlap_by_half(chunked, direct):
    long = chunked[0]
    _check(long, direct(0), slice(0, SIZE - 1), window_start=0)
    for start in (SIZE // 2, SIZE, 3 * SIZE // 2):
        first = start + SIZE // 2 - 1  # the byte at the middle of the window
        _check(long, direct(start), slice(first, first + SIZE // 2), window_start=start)


def test_every_byte_has_a_value_at_stage_0_and_inner_stages_only_where_a_chunk_starts(chunked):
    for text in chunked:
        outer, inner = text.stages
        assert len(outer.boundary_prob) == len(text.text)
        assert np.isfinite(outer.boundary_prob).all()
        np.testing.assert_array_equal(np.isfinite(inner.boundary_prob), outer.is_boundary)
        assert (inner.is_boundary <= outer.is_boundary).all()
        assert 0 < inner.is_boundary.sum() < outer.is_boundary.sum() < len(text.text)


def test_empty_text_and_a_model_without_stages_have_no_boundaries(model):
    config, params = model
    (empty,) = chunk_texts(config, params, [("empty", b"")])
    assert [len(stage.boundary_prob) for stage in empty.stages] == [0, 0]
    stage = StageConfig(width=16, encoder="t1", decoder="", num_heads=2)
    flat = RunConfig(model=HNetConfig(stages=(stage,)), tokens_per_chunk=())
    assert chunk_texts(flat, random_params(flat.model), [("flat", TEXT)])[0].stages == ()


def test_positions_skip_padding(model, direct):
    output = direct(0)
    for name, (position, probability, boundary) in byte_boundaries(output, row=0).items():
        assert position.shape == probability.shape == boundary.shape, name
        assert position[0] == 0 and (np.diff(position) > 0).all()
