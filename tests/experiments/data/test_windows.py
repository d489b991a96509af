import itertools
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.data import BOS, BatchSource, EvaluationSource, WindowSource, load_corpus, prefetch
from experiments.errors import UsageError

# Tiny, odd, not UTF-8, and with BOS and 0 among the data.
TOY = [b"a", b"\xfe\xfe", bytes(range(256)), b"\x00", "grün".encode("latin-1"), b"xyz" * 33, b"\xfe", b"end"]


def _split(documents: list[bytes] = TOY) -> SimpleNamespace:
    """The part of a DocumentSplit that windows use."""
    return SimpleNamespace(
        lengths=np.array([len(document) for document in documents], np.int64),
        read=lambda document, start, stop: np.frombuffer(documents[document][start:stop], np.uint8),
    )


def _stream(windows: WindowSource) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Recovers (tokens, number of the document, is_bos) of the whole stream from all windows."""
    tokens, document, is_bos = [], [], []
    for i in range(len(windows)):
        window = windows[i]
        valid = window["segment_ids"] > 0
        segment, starts_here = window["segment_ids"][valid], not window["is_continuation"]
        begins = np.diff(segment, prepend=0) > 0
        begins[0] = starts_here
        if i:  # the first position of a window repeats the last of the window before
            assert window["tokens"][0] == tokens[-1]
            assert begins[0] == is_bos[-1]
            valid[0], segment, begins = False, segment[1:], begins[1:]
        tokens.extend(window["tokens"][valid])
        is_bos.extend(begins)
        document.extend(np.cumsum(begins) + (document[-1] if document else -1))
    return np.array(tokens), np.array(document), np.array(is_bos)


def _assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(actual[key], expected[key], err_msg=key)
        assert actual[key].dtype == expected[key].dtype


def _byte_targets(batch: dict[str, np.ndarray]) -> np.ndarray:
    segments = batch["segment_ids"]
    return batch["tokens"][..., 1:][(segments[..., 1:] > 0) & (segments[..., 1:] == segments[..., :-1])]


@pytest.mark.parametrize("sequence_length", [1, 2, 7, 64, 373, 374, 375, 1000])
def test_every_document_is_in_the_stream_once_after_its_bos(sequence_length):
    assert sum(map(len, TOY)) + len(TOY) == 375  # so that 374 is all predictions in one window
    windows = WindowSource(_split(), sequence_length, seed=3)
    assert len(windows) == math.ceil(374 / sequence_length)
    tokens, document, is_bos = _stream(windows)
    assert (tokens[is_bos] == BOS).all()
    contents = [tokens[(document == i) & ~is_bos].astype(np.uint8).tobytes() for i in range(document[-1] + 1)]
    assert sorted(contents) == sorted(TOY)
    assert contents != TOY  # the order is a permutation


@pytest.mark.parametrize("sequence_length", [1, 7, 64, 1000])
def test_every_byte_is_a_target_once_per_epoch(sequence_length):
    windows = WindowSource(_split(), sequence_length, seed=0)
    batches = BatchSource(windows, 1, seed=1)
    for epoch in range(3):
        steps = range(epoch * len(windows), (epoch + 1) * len(windows))
        targets = np.concatenate([_byte_targets(batches[step]) for step in steps])
        assert sorted(targets) == sorted(b"".join(TOY))


def test_windows_have_one_shape_and_padding_only_at_the_very_end():
    windows = WindowSource(_split(), 50, seed=0)
    assert len(windows) == 8  # 374 predictions
    for window in map(windows.__getitem__, range(8)):
        assert window["tokens"].shape == window["segment_ids"].shape == (51,)
        assert window["tokens"].dtype == window["segment_ids"].dtype == np.int32
    assert all((windows[i]["segment_ids"] > 0).all() for i in range(7))
    last = windows[7]
    np.testing.assert_array_equal(last["segment_ids"] > 0, np.arange(51) < 25)
    assert not last["tokens"][25:].any()
    with pytest.raises(IndexError, match="window 8 is not one of the 8"):
        windows[8]


def test_segments_count_from_one_in_every_window_and_continuations_are_told():
    windows = WindowSource(_split([b"abcde", b"fghij"]), 4, seed=0)
    assert [window["segment_ids"].tolist() for window in windows] == [
        [1, 1, 1, 1, 1], [1, 1, 2, 2, 2], [1, 1, 1, 1, 0]]
    assert [bool(window["is_continuation"]) for window in windows] == [False, True, True]
    # A window that opens with BOS continues nothing, though the window before has predicted that BOS.
    windows = WindowSource(_split([b"abc", b"def"]), 4, seed=0)
    assert [bool(window["is_continuation"]) for window in windows] == [False, False]


def test_byte_counts_match_the_windows():
    for sequence_length in (1, 7, 64, 1000):
        windows = WindowSource(_split(), sequence_length, seed=0)
        counted = windows.num_bytes(np.arange(len(windows)))
        assert counted.tolist() == [len(_byte_targets(window)) for window in windows]


def test_a_corpus_smaller_than_a_window_is_padded():
    (window,) = WindowSource(_split([b"ab"]), 8, seed=0)
    assert window["tokens"].tolist() == [BOS, 97, 98, 0, 0, 0, 0, 0, 0]
    batch = BatchSource(WindowSource(_split([b"ab"]), 8, seed=0), 3, seed=0)[5]
    assert (batch["tokens"] == window["tokens"]).all()


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(process_count):
    windows = WindowSource(_split(), 7, seed=0)
    for make in (lambda **kwargs: BatchSource(windows, 12, seed=5, **kwargs),
                 lambda **kwargs: EvaluationSource(windows, 12, num_bytes=10**9, **kwargs)):
        whole = make()
        parts = [make(process_index=i, process_count=process_count) for i in range(process_count)]
        for step in range(5):
            joined = {key: np.concatenate([part[step][key] for part in parts]) for key in whole[step]}
            _assert_equal(joined, whole[step])


def test_a_batch_is_the_same_whether_reached_or_jumped_to():
    windows = WindowSource(_split(), 7, seed=0)
    walked = [BatchSource(windows, 4, seed=5)[step] for step in range(40)]
    fresh = BatchSource(WindowSource(_split(), 7, seed=0), 4, seed=5)
    for step in (39, 0, 17):
        _assert_equal(fresh[step], walked[step])
    for step, batch in zip(range(13, 40), prefetch(fresh, start_step=13), strict=False):
        _assert_equal(batch, walked[step])


def test_windows_are_shuffled_anew_in_every_epoch_and_by_every_seed():
    windows = WindowSource(_split(), 7, seed=0)
    orders = set()
    for seed, epoch in itertools.product(range(3), range(3)):
        batches = BatchSource(windows, 1, seed=seed)
        steps = range(epoch * len(windows), (epoch + 1) * len(windows))
        orders.add(b"".join(batches[step]["tokens"].tobytes() for step in steps))
    # Nine, not five: epoch 1 of one seed must not be epoch 0 of the next.
    assert len(orders) == 9


def test_batches_run_across_the_end_of_an_epoch():
    batches = BatchSource(WindowSource(_split(), 50, seed=0), 3, seed=0)
    assert batches.steps_per_epoch == 8 / 3
    targets = np.concatenate([_byte_targets(batches[step]) for step in range(8)])  # three epochs
    assert sorted(targets) == sorted(b"".join(TOY) * 3)


def test_evaluation_takes_what_was_asked_for_from_many_documents():
    documents = [bytes([i]) * 100 for i in range(100)]
    evaluation = EvaluationSource(WindowSource(_split(documents), 10, seed=0), 4, num_bytes=500)
    batches = list(evaluation)
    assert len(batches) == len(evaluation)
    assert {batch["tokens"].shape for batch in batches} == {(4, 11)}
    targets = np.concatenate([_byte_targets(batch) for batch in batches])
    assert 500 <= len(targets) == evaluation.num_bytes < 510
    assert len(set(targets)) > 30


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_evaluation_of_a_small_split_takes_all_of_it_and_pads_the_last_batch(batch_size):
    evaluation = EvaluationSource(WindowSource(_split(), 50, seed=0), batch_size, num_bytes=10**9)
    batches = list(evaluation)
    assert {batch["is_continuation"].shape for batch in batches} == {(batch_size,)}
    targets = np.concatenate([_byte_targets(batch) for batch in batches])
    assert sorted(targets) == sorted(b"".join(TOY))
    assert evaluation.num_bytes == len(b"".join(TOY))
    rows = np.concatenate([batch["segment_ids"] for batch in batches])
    assert rows[:8].any(axis=1).all()
    assert not rows[8:].any()


@pytest.mark.parametrize("source", [BatchSource, EvaluationSource])
def test_a_batch_that_cannot_be_divided_is_refused(source):
    windows, rest = WindowSource(_split(), 7, seed=0), {"process_index": 0, "process_count": 4}
    rest |= {"seed": 0} if source is BatchSource else {"num_bytes": 9}
    with pytest.raises(UsageError, match=r"batch size 6 .* 4 processes; set config\.data\.batch_size"):
        source(windows, 6, **rest)


def test_windows_without_predictions_are_refused():
    with pytest.raises(UsageError, match=r"config\.data\.sequence_length"):
        WindowSource(_split(), 0, seed=0)


# Bytes to predict, where a marker in the documents says which


MARKED = [b"Q: 1+1 A: 2", b"none", b"Q A: first A: second", b" A:", b"A: a document of some length " * 3, b"A"]


def _masked_bytes(window: dict[str, np.ndarray]) -> bytes:
    segments = window["segment_ids"]
    is_target = (segments[1:] > 0) & (segments[1:] == segments[:-1]) & window["loss_mask"][1:]
    assert window["loss_mask"].dtype == bool
    return window["tokens"][1:][is_target].astype(np.uint8).tobytes()


@pytest.mark.parametrize("search_bytes", [1, 2, 5, 65_536])
@pytest.mark.parametrize("sequence_length", [1, 3, 7, 1000])
def test_what_follows_the_first_marker_is_predicted_once_wherever_windows_begin(
    sequence_length, search_bytes, monkeypatch
):
    monkeypatch.setattr("experiments.data.windows.SEARCH_BYTES", search_bytes)
    windows = WindowSource(_split(MARKED), sequence_length, seed=0, loss_marker=b"A:")
    order = np.random.RandomState(0).permutation(len(MARKED))
    expected = b"".join(MARKED[document].partition(b"A:")[2] for document in order)
    found = [_masked_bytes(windows[index]) for index in range(len(windows))]
    assert b"".join(found) == expected
    assert windows.num_bytes(np.arange(len(windows))).tolist() == list(map(len, found))
    alone = WindowSource(_split(MARKED), sequence_length, seed=0, loss_marker=b"A:")
    for index in reversed(range(len(windows))):  # no window depends on those read before
        _assert_equal(alone[index], windows[index])


def test_evaluation_counts_bytes_to_predict_and_masks_its_padding():
    windows = WindowSource(_split(MARKED), 7, seed=0, loss_marker=b"A:")
    total = sum(len(document.partition(b"A:")[2]) for document in MARKED)
    evaluation = EvaluationSource(windows, 8, num_bytes=10**9)
    assert evaluation.num_bytes == total == sum(
        len(_masked_bytes({key: batch[key][row] for key in batch})) for batch in evaluation for row in range(8))
    some = EvaluationSource(windows, 8, num_bytes=20)
    assert 20 <= some.num_bytes < 27


def test_without_a_marker_there_is_no_mask():
    assert "loss_mask" not in WindowSource(_split(), 7, seed=0)[0]


@pytest.mark.parametrize("marker", [b"nowhere", b"second"])
def test_a_marker_with_nothing_after_it_is_refused(marker):
    with pytest.raises(UsageError, match=rf"loss_after '{marker.decode()}': none of the 6 documents"):
        WindowSource(_split(MARKED), 7, seed=0, loss_marker=marker)


def test_prefetch_reads_ahead_and_no_further():
    read, third = [], threading.Event()

    class Steps:
        def __getitem__(self, step: int) -> int:
            read.append(step)
            if step == 12:
                third.set()
            return step

    batches = prefetch(Steps(), start_step=10, depth=2)
    assert next(batches) == 10
    assert third.wait(timeout=10)
    batches.close()
    assert read == [10, 11, 12]
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_what_fails_in_the_reading_thread_is_raised_to_the_consumer():
    def read(step: int) -> int:
        if step == 3:
            raise OSError("the disk is gone")
        return step

    batches = prefetch(SimpleNamespace(__getitem__=read), start_step=1)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_windows_read_a_prepared_corpus(tmp_path):
    rng = np.random.default_rng(0)
    contents = [rng.bytes(int(size)) for size in rng.integers(1, 3000, size=60)]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.bin").write_bytes(content)
    corpus = load_corpus(f"files:{tmp_path}/*.bin", cache_dir=str(tmp_path / "cache"))
    streams = [_stream(WindowSource(corpus.split(split), 64, seed=0)) for split in ("train", "held_out")]
    documents = [tokens[(document == i) & ~is_bos].astype(np.uint8).tobytes()
                 for tokens, document, is_bos in streams for i in range(document[-1] + 1)]
    assert sorted(documents) == sorted(contents)
