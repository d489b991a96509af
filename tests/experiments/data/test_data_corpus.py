import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from experiments.data import Corpus, byte_text, load_corpus
from experiments.data import corpus as corpus_module
from experiments.data.byte_text import RECORD_BYTES
from experiments.errors import UsageError


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    directory = tmp_path / "texts"
    directory.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        (directory / f"{i:02}").write_bytes(rng.bytes(i * i))
    (directory / "long").write_bytes(rng.bytes(3 * RECORD_BYTES + 7))
    return directory


def _load(texts: Path) -> Corpus:
    return load_corpus(f"files:{texts}/*", cache_dir=str(texts.parent / "cache"))


def _load_after(barrier, texts: Path) -> None:
    barrier.wait()
    _load(texts)


def test_any_slice_is_that_slice_of_the_file(texts):
    corpus, rng = _load(texts), np.random.default_rng(1)
    for split in map(corpus.split, ("train", "held_out")):
        for document, (name, length) in enumerate(zip(split.names, split.lengths, strict=True)):
            content = Path(name).read_bytes()
            assert length == len(content)
            for _ in range(20):
                start, stop = sorted(rng.integers(0, length + 1, size=2))
                piece = split.read(document, start, stop)
                assert (piece.dtype, piece.tobytes()) == (np.uint8, content[start:stop])


def test_the_ends_of_records_are_no_ends_of_reading(texts):
    split = next(s for s in map(_load(texts).split, ("train", "held_out")) if f"{texts}/long" in s.names)
    document, content = split.names.index(f"{texts}/long"), (texts / "long").read_bytes()
    edges = [0, 1, RECORD_BYTES - 1, RECORD_BYTES, RECORD_BYTES + 1, 3 * RECORD_BYTES, len(content)]
    for start in edges:
        for stop in [edge for edge in edges if edge >= start]:
            assert split.read(document, start, stop).tobytes() == content[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, 10**6)])
def test_reading_outside_a_document_is_refused(texts, start, stop):
    with pytest.raises(IndexError, match="not within"):
        _load(texts).split("train").read(0, start, stop)


EDGES = [(5, 300), (7, 7), (0, RECORD_BYTES), (RECORD_BYTES - 1, RECORD_BYTES)]


@pytest.mark.parametrize(("start", "stop"), EDGES)
def test_a_slice_within_one_record_decodes_no_other(texts, monkeypatch, start, stop):
    split = next(s for s in map(_load(texts).split, ("train", "held_out")) if f"{texts}/long" in s.names)
    decoded = []
    monkeypatch.setattr(type(split), "_records", property(lambda self: RecordLog(self, decoded)))
    split.read(split.names.index(f"{texts}/long"), RECORD_BYTES + start, RECORD_BYTES + stop)
    assert len(decoded) == 1


class RecordLog:
    def __init__(self, split, decoded: list[int]) -> None:
        self._decoded = decoded

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        self._decoded.append(number)
        return {"content": np.zeros(RECORD_BYTES, np.uint8)}


def test_no_text_is_in_both_splits(texts):
    (texts / "copy").write_bytes((texts / "07").read_bytes())
    corpus = _load(texts)
    train, held_out = ({Path(name).read_bytes() for name in corpus.split(s).names} for s in ("train", "held_out"))
    assert train.isdisjoint(held_out)
    assert len(train) + len(held_out) == corpus.fingerprint["files"] - 1


def test_the_second_load_prepares_nothing(texts, capsys, monkeypatch):
    first = _load(texts)
    assert "preparing files:" in capsys.readouterr().out
    monkeypatch.setattr(corpus_module, "_prepare", lambda *_: pytest.fail("prepared again"))
    second = _load(texts)
    assert capsys.readouterr().out == ""
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint["skipped_empty"] == 1


@pytest.mark.parametrize("change", ["content", "size", "new", "gone"])
def test_a_changed_corpus_is_prepared_anew(texts, change):
    before = _load(texts).fingerprint
    if change == "content":  # same size: told by the time of modification
        stat, content = (texts / "07").stat(), (texts / "07").read_bytes()
        (texts / "07").write_bytes(content[::-1])
        os.utime(texts / "07", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    elif change == "size":
        (texts / "07").write_bytes(b"longer than it was" * 9)
    elif change == "new":
        (texts / "another").write_bytes(b"new")
    else:
        (texts / "07").unlink()
    after = _load(texts).fingerprint
    assert after["sha256"] != before["sha256"]
    assert after["files"] - before["files"] == {"new": 1, "gone": -1}.get(change, 0)


def test_a_preparation_that_failed_leaves_nothing_to_be_used(texts, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt  # with all records written and the index not

    monkeypatch.setattr(byte_text, "_record_numbers", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _load(texts)
    assert list((texts.parent / "cache").iterdir()) == []
    monkeypatch.undo()
    assert _load(texts).fingerprint["files"] == 40


def test_processes_that_prepare_at_once_all_end_with_one_corpus(texts):
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    processes = [spawn.Process(target=_load_after, args=(barrier, texts)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list((texts.parent / "cache").iterdir())) == 1
    assert _load(texts).fingerprint["files"] == 40


def test_a_name_taken_meanwhile_is_used_and_no_error(texts, monkeypatch):
    rival = _load(texts)
    opened = corpus_module.open_source(f"files:{texts}/*")
    (directory,) = (texts.parent / "cache").iterdir()
    corpus_module._prepare(opened, directory)
    assert Corpus(directory).fingerprint == rival.fingerprint
    assert list((texts.parent / "cache").iterdir()) == [directory]


def test_a_cache_that_cannot_be_written_names_the_field(texts):
    (texts.parent / "cache").write_text("a file, not a directory")
    with pytest.raises(UsageError, match=r"cannot prepare .*set --config\.data\.cache_dir"):
        _load(texts)


@pytest.mark.parametrize("cache_dir", [None, ""])
def test_the_cache_follows_xdg_by_default(texts, monkeypatch, cache_dir):
    monkeypatch.setenv("XDG_CACHE_HOME", str(texts.parent / "xdg"))
    load_corpus(f"files:{texts}/*", cache_dir=cache_dir)
    assert len(list((texts.parent / "xdg" / "hnet-jax" / "data").iterdir())) == 1
