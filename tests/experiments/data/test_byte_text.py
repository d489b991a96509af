import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data.byte_text import RECORD_BYTES, open_records, prepare
from experiments.data.sources import Document, Source, open_source
from experiments.errors import UsageError

TRAIN = [b"\xfe\xff not UTF-8 \x00", b"x" * RECORD_BYTES, bytes(range(256)) * 1000, b"", b"last"]
HELD_OUT = [b"", b"held out"]


def _source(train: list[bytes] = TRAIN, held_out: list[bytes] = HELD_OUT) -> Source:
    documents = [Document(f"train{i}", content, "train") for i, content in enumerate(train)]
    documents += [Document(f"held{i}", content, "held_out") for i, content in enumerate(held_out)]
    return Source(name="toy", paths=(), documents=lambda: iter(documents))


def _fingerprint(tmp_path, name: str, source: Source) -> dict:
    prepare(source, tmp_path / name)
    return json.loads((tmp_path / name / "index.json").read_text())["fingerprint"]


def test_parts_found_through_the_index_are_the_documents(tmp_path):
    prepare(_source(), tmp_path)
    index, records = json.loads((tmp_path / "index.json").read_text()), open_records(tmp_path, "train")
    parts = [records[number] for number in index["train"]["records"]]
    assert max(len(part["content"]) for part in parts) <= RECORD_BYTES == index["record_bytes"]
    assert all(part["content"].dtype == np.uint8 for part in parts)
    assert index["train"]["names"] == ["train0", "train1", "train2", "train4"]
    assert index["train"]["lengths"] == [len(content) for content in TRAIN if content]
    assert [(part["document"], part["part"]) for part in parts] == [
        (document, part) for document, parts in enumerate([1, 1, 4, 1]) for part in range(parts)]
    assert b"".join(part["content"].tobytes() for part in parts) == b"".join(TRAIN)


def test_empty_documents_are_skipped_and_counted(tmp_path):
    fingerprint = _fingerprint(tmp_path, "toy", _source())
    assert (fingerprint["files"], fingerprint["skipped_empty"]) == (5, 2)
    assert fingerprint["bytes"] == len(b"".join(TRAIN + HELD_OUT))


def test_the_prepared_format_calls_the_held_out_split_test(tmp_path):
    fingerprint = _fingerprint(tmp_path, "toy", _source())
    index = json.loads((tmp_path / "toy" / "index.json").read_text())
    assert set(index) == {"fingerprint", "record_bytes", "train", "test"} and index["test"]["names"] == ["held1"]
    assert fingerprint["sha256"] == "4b26fc55c18f07963ea3061640ef3f4578b10b455d0153467858b241cf45688b"


def test_fingerprints_tell_order_and_boundaries_and_splits_but_not_names(tmp_path):
    corpora = [
        ([b"a", b"bc"], [b"d"]), ([b"bc", b"a"], [b"d"]), ([b"ab", b"c"], [b"d"]), ([b"a"], [b"bc", b"d"])]
    fingerprints = [_fingerprint(tmp_path, str(i), _source(*corpus)) for i, corpus in enumerate(corpora)]
    assert len({fingerprint["sha256"] for fingerprint in fingerprints}) == len(corpora)
    renamed = Source(name="other", paths=(), documents=lambda: (
        document._replace(name="other") for document in _source(*corpora[0]).documents()))
    assert _fingerprint(tmp_path, "renamed", renamed) == fingerprints[0]


@pytest.mark.parametrize(
    ("train", "held_out", "missing"), [([b"one"], [b""], "held_out"), ([], [b"one"], "train")])
def test_a_split_without_text_is_refused(tmp_path, train, held_out, missing):
    message = rf"the {missing} split has no documents and the other 1; .*files:pieces/\*"
    with pytest.raises(UsageError, match=message):
        prepare(_source(train, held_out), tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_preparing_prints_nothing_of_its_own(tmp_path, capfd):
    prepare(_source(), tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_prepared_set_opens_without_this_code(tmp_path):
    prepare(_source(), tmp_path)
    builder = tfds.builder_from_directory(tmp_path / "byte_text" / "1.0.0")
    assert builder.info.features["content"].np_dtype == np.uint8
    assert len(builder.as_data_source("test")) == 1


def test_its_bytes_are_no_text_feature(tmp_path):
    prepare(_source(), tmp_path)
    with pytest.raises(UsageError, match="none of its features is text"):
        open_source(f"tfds:{tmp_path}/byte_text/1.0.0", text_key="content")


def test_tensorflow_is_never_imported_and_the_import_alone_is_light(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    program = f"""
        import sys
        from experiments.data import BatchSource, WindowSource, load_corpus
        heavy = {{"tensorflow", "tensorflow_datasets", "grain", "array_record"}}
        assert heavy.isdisjoint(sys.modules), heavy.intersection(sys.modules)
        corpus = load_corpus("files:{tmp_path}/*.txt", cache_dir="{tmp_path}/cache")
        BatchSource(WindowSource(corpus.split("train"), 8, seed=0), 2, seed=0)[0]
        assert "tensorflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
