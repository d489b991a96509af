import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data.sources import Document, open_source, split_by_content
from experiments.errors import UsageError


class ToyText(tfds.core.GeneratorBasedBuilder):
    """`sizes` texts per split under "text", and a number under "label"."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, data_dir: Path, sizes: dict[str, int]) -> None:
        self._sizes = sizes
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, size) for split, size in self._sizes.items()}

    def _generate_examples(self, split, size):
        for i in range(size):
            yield i, {"text": f"{split} text {i}", "label": i}


def _prepared(tmp_path: Path, file_format: str = "array_record", **sizes: int) -> str:
    builder = ToyText(data_dir=tmp_path, sizes=sizes)
    builder.download_and_prepare(file_format=file_format)
    return f"tfds:{builder.data_path}"


def _documents(source: str, **kwargs) -> list[Document]:
    return list(open_source(source, **kwargs).documents())


def test_stdlib_is_code_and_prose_in_two_disjoint_splits():
    documents = _documents("stdlib")
    names = {document.name for document in documents}
    assert {"json/decoder.py", "topics/assert"} <= names
    assert len(names) == len(documents)
    assert not any(Path(name).parts[0] in ("site-packages", "test", "pydoc_data") for name in names)
    held_out = {document.content for document in documents if document.split == "held_out"}
    assert 0.05 < len(held_out) / len(documents) < 0.15
    assert held_out.isdisjoint(document.content for document in documents if document.split == "train")


def test_a_stripped_standard_library_points_to_files(tmp_path, monkeypatch):
    (tmp_path / "os.py").write_text("import sys")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match=r"has 1 library .*--config\.data\.source=files:GLOB"):
        open_source("stdlib")


def test_files_are_found_recursively_and_read_as_raw_bytes_in_order_of_their_names(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    contents = {"b.txt": b"\xfe\xff\x00", "sub/a.txt": "grün".encode("latin-1"), "sub/deep/c.txt": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    documents = _documents(f"files:{tmp_path}/**/*.txt")
    assert [(document.name, document.content) for document in documents] == [
        (f"{tmp_path}/{name}", content) for name, content in contents.items()]


def test_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"home")
    assert [document.content for document in _documents("files:~/*.txt")] == [b"home"]


def test_the_split_depends_on_content_alone(tmp_path):
    for name, start in (("here", 0), ("there", 20)):
        (tmp_path / name).mkdir()
        for i in range(start, 60):
            (tmp_path / name / f"{name}{i}").write_bytes(b"text %d" % i)
    here, there = ({document.content: document.split for document in _documents(f"files:{tmp_path}/{name}/*")}
                   for name in ("here", "there"))
    assert there.items() < here.items()
    # The hash is part of the format: another one would let held-out text into training on resume.
    assert [i for i in range(60) if split_by_content(b"text %d" % i) == "held_out"] == [2, 11, 20, 30, 31]


@pytest.mark.parametrize("source", ["files:", "books/*.txt", "tfds", "stdlib:"])
def test_what_is_not_a_source_is_refused_with_what_is(source):
    with pytest.raises(UsageError, match=r"--config\.data\.source=.* stdlib, files:GLOB .* or tfds:NAME"):
        open_source(source)


def test_a_glob_without_matches_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no file matches .*nothing.*--config\.data\.source"):
        open_source(f"files:{tmp_path}/nothing*")


def test_only_empty_files_are_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UsageError, match=r"are empty \(1 of them\); change --config\.data\.source"):
        open_source(f"files:{tmp_path}/*")


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    source = open_source(f"files:{tmp_path}/*")
    (tmp_path / "good.txt").unlink()
    with pytest.raises(UsageError, match=r"cannot read .*good\.txt: No such file"):
        list(source.documents())
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"cannot read .*broken\.txt: No such file"):
        open_source(f"files:{tmp_path}/*")


def test_tfds_sets_keep_their_own_splits(tmp_path):
    documents = _documents(_prepared(tmp_path, train=3, validation=2, test=1))
    assert sorted(document.content for document in documents if document.split == "train") == [
        b"train text 0", b"train text 1", b"train text 2"]
    assert sorted(document.content for document in documents if document.split == "held_out") == [
        b"validation text 0", b"validation text 1"]


def test_tfds_sets_of_one_split_are_split_by_content(tmp_path):
    documents = _documents(_prepared(tmp_path, train=40))
    assert {document.split for document in documents} == {"train", "held_out"}
    assert all(document.split == split_by_content(document.content) for document in documents)


@pytest.mark.parametrize("text_key", ["body", "label"])
def test_a_wrong_text_key_lists_those_that_fit(tmp_path, text_key):
    source = _prepared(tmp_path, train=1)
    with pytest.raises(UsageError, match=rf"'{text_key}'; set --config\.data\.text_key to one of: text$"):
        open_source(source, text_key=text_key)


def test_tfds_names_that_do_not_fit_are_refused_with_the_command_that_prepares(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"'lambda' .*did you mean 'lambada'\?"):
        open_source("tfds:lambda")
    with pytest.raises(UsageError, match=r"tfds build NAME --file_format=array_record"):
        open_source(f"tfds:{tmp_path}")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(UsageError, match=r"`tfds build lambada --file_format=array_record`"):
        open_source("tfds:lambada")


def test_tfds_sets_in_another_format_are_refused_with_the_command_that_converts(tmp_path):
    source = _prepared(tmp_path, file_format="parquet", train=2)
    with pytest.raises(UsageError, match=r"as parquet.*`tfds build toy_text/1\.0\.0 --file_format=array"):
        open_source(source)
