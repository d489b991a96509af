import jax
import numpy as np
import pytest

from experiments.analysis import boundaries
from experiments.analysis.boundaries import byte_boundaries, chunk_texts
from experiments.config import DataConfig, RunConfig
from experiments.data import BOS
from hnet import HNetConfig, HNetLM
from tests.support.assertions import SAME_COMPUTATION
from tests.support.models import make_stage, random_params

SIZE = 32
TEXT = np.random.default_rng(0).bytes(131)  # some of it is no UTF-8


@pytest.fixture(scope="module")
def model():
    """(config, params) of a model that cuts at random; its capacity while training would be too small here."""
    stage = dict(width=16, capacity=0.25, num_heads=2, rotary_width=8)
    stages = (make_stage(encoder="t1", decoder="t1", **stage), make_stage(encoder="t1", decoder="t1", **stage),
              make_stage(encoder="t1", **stage))
    config = RunConfig(
        model=HNetConfig(stages=stages), data=DataConfig(sequence_length=SIZE), tokens_per_chunk=(2.0, 2.0))
    return config, random_params(config.model)


@pytest.fixture(scope="module")
def reading(model):
    """(texts, traces): TEXT as a whole, one window of it with BOS, and fewer bytes; every trace of the model."""
    config, params = model
    texts, traces = [("long", TEXT), ("window", TEXT[: SIZE - 1]), ("short", TEXT[:20])], []
    with pytest.MonkeyPatch.context() as patch:
        run = boundaries._read_windows
        patch.setattr(boundaries, "_read_windows", lambda *arguments: traces.append(arguments) or run(*arguments))
        return chunk_texts(config, params, texts), traces


@pytest.fixture(scope="module")
def chunked(reading):
    return reading[0]


@pytest.fixture(scope="module")
def direct(model):
    """The model run on stream positions start to start + SIZE: what byte_boundaries makes of it."""
    config, params = model
    run = jax.jit(HNetLM(config.model.at_full_capacity()).apply)
    stream = np.frombuffer(bytes([BOS]) + TEXT, np.uint8).astype(np.int32)
    return lambda start: run({"params": params}, stream[None, start : start + SIZE])


def _check(chunked, output, bytes_read: slice, window_start: int) -> None:
    """Compares some bytes of a text with a run on one window: position i + 1 - window_start is byte i."""
    read = slice(bytes_read.start + 1 - window_start, bytes_read.stop + 1 - window_start)
    inner_positions = np.arange(SIZE)
    for stage in chunked.stages:
        seen = output.stages[stage.name]
        mask = np.asarray(seen.is_real[0])
        prob, boundary = np.full(SIZE, np.nan), np.zeros(SIZE, bool)
        prob[inner_positions] = np.asarray(seen.boundary_prob[0])[mask]
        boundary[inner_positions] = np.asarray(seen.boundary_mask[0])[mask]
        inner_positions = np.flatnonzero(boundary)
        np.testing.assert_allclose(stage.boundary_prob[bytes_read], prob[read], atol=SAME_COMPUTATION)
        np.testing.assert_array_equal(stage.is_boundary[bytes_read], boundary[read])


def _check_nats(chunked, output, bytes_read: slice, window_start: int) -> None:
    """Against float64: byte i is predicted at position i - window_start, by what is before it."""
    odds = np.exp(np.asarray(output.logits[0], np.float64))
    position = np.arange(bytes_read.start, bytes_read.stop) - window_start
    values = np.frombuffer(chunked.text, np.uint8)[bytes_read]
    expected = -np.log(odds[position, values] / odds[position].sum(axis=-1))
    np.testing.assert_allclose(chunked.nats[bytes_read], expected, atol=SAME_COMPUTATION)


def test_a_text_of_one_window_has_the_boundaries_of_a_single_run(chunked, direct):
    _, window, short = chunked
    _check(window, direct(0), slice(0, SIZE - 1), window_start=0)
    _check(short, direct(0), slice(0, 20), window_start=0)  # causal: the padding behind it does not matter
    assert len(short.stages[0].is_boundary) == 20 and short.text == TEXT[:20]
    for text in (window, short):
        _check_nats(text, direct(0), slice(0, len(text.text)), window_start=0)  # the first byte, after BOS alone


def test_a_long_text_is_read_from_windows_that_overlap_by_half(chunked, direct):
    long = chunked[0]
    _check(long, direct(0), slice(0, SIZE - 1), window_start=0)
    for start in (SIZE // 2, SIZE, 3 * SIZE // 2):
        first = start + SIZE // 2 - 1  # the byte at the middle of the window
        _check(long, direct(start), slice(first, first + SIZE // 2), window_start=start)
        _check_nats(long, direct(start), slice(first + 1, first + 1 + SIZE // 2), window_start=start)
    assert np.isfinite(long.nats).all()


def test_texts_of_any_length_compile_once(reading):
    _, traces = reading
    assert len(traces) == 1


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
    assert empty.nats.shape == (0,)
    assert [len(stage.boundary_prob) for stage in empty.stages] == [0, 0]
    stage = make_stage(width=16, encoder="t1", num_heads=2)
    flat = RunConfig(model=HNetConfig(stages=(stage,)), tokens_per_chunk=())
    (flat_text,) = chunk_texts(flat, random_params(flat.model), [("flat", TEXT)])
    assert flat_text.stages == () and np.isfinite(flat_text.nats).all()


def test_positions_skip_padding(model, direct):
    output = direct(0)
    for name, (position, probability, boundary) in byte_boundaries(output.stages, row=0).items():
        assert position.shape == probability.shape == boundary.shape, name
        assert position[0] == 0 and (np.diff(position) > 0).all()
