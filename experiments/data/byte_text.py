"""Prepares a source as ArrayRecord files with tensorflow-datasets, without TensorFlow itself.

  directory/byte_text/1.0.0/   the records: {document: int64, part: int32, content: uint8 [<= 64 KiB]}
  directory/index.json         {"fingerprint", "record_bytes", "train": a SplitIndex, "test": another}

The held-out split is called "test" on disk (`STORED_NAMES`), as tensorflow-datasets calls it.

Documents are cut into parts so that reading 256 bytes never decodes a megabyte. Their lengths and the number
of the record that holds each part are in the index, so a reader can find any byte without a scan.
"""
import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.data.sources import SPLITS, STORED_NAMES, Source, Split
from experiments.errors import UsageError

RECORD_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True)
class SplitIndex:
    """Documents in their order; `records` has one entry per part, document after document."""

    names: list[str] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)  # bytes
    records: list[int] = dataclasses.field(default_factory=list)


def prepare(source: Source, directory: Path) -> None:
    """Writes records and index into the empty `directory`.

    The index is written last, but a killed process still leaves a partial directory behind: callers prepare
    under a temporary name and rename.

    Raises:
      UsageError: a document cannot be read, or a split has no documents.
    """
    builder = ByteText(source=source, data_dir=directory)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # two bold lines about downloads that do not happen
        # The default format is TFRecord, which generates everything and then needs TensorFlow to write it.
        builder.download_and_prepare(file_format="array_record")
    for split, index in builder.index.items():
        index.records.extend(_record_numbers(builder.as_data_source(STORED_NAMES[split]), index.lengths))
    contents = {"fingerprint": builder.fingerprint(), "record_bytes": RECORD_BYTES}
    contents |= {STORED_NAMES[split]: dataclasses.asdict(index) for split, index in builder.index.items()}
    (directory / "index.json").write_text(json.dumps(contents), encoding="utf-8")


def open_records(directory: Path, split: Split) -> Sequence[Mapping[str, Any]]:
    """Opens what `prepare` wrote, for access by record number."""
    return tfds.builder_from_directory(directory / "byte_text" / "1.0.0").as_data_source(STORED_NAMES[split])


class ByteText(tfds.core.GeneratorBasedBuilder):
    """The documents of one source. Fills `index` and the fingerprint while it generates."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source: Source, data_dir: Path) -> None:
        self.index: dict[Split, SplitIndex] = {split: SplitIndex() for split in SPLITS}
        self._source = source
        self._num_empty = 0
        self._sha256 = hashlib.sha256()
        super().__init__(data_dir=data_dir)

    def fingerprint(self) -> dict[str, Any]:
        """Tells corpora apart: equal fingerprints mean the same documents in the same order and splits."""
        lengths = [length for index in self.index.values() for length in index.lengths]
        return {
            "files": len(lengths),
            "bytes": sum(lengths),
            "sha256": self._sha256.hexdigest(),  # of split, length and content of every document
            "skipped_empty": self._num_empty,
        }

    def _info(self) -> tfds.core.DatasetInfo:
        # Without an encoding every byte would be stored, and decoded, as an int64.
        content = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
        features = {"document": np.int64, "part": np.int32, "content": content}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        return {STORED_NAMES[split]: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: Split) -> Iterator[tuple[str, dict[str, Any]]]:
        # Each split reads the whole source: a second pass over files costs less than a split in memory.
        index, num_elsewhere = self.index[split], 0
        for document in self._source.documents():
            if document.split != split:
                num_elsewhere += 1
            elif not document.content:
                self._num_empty += 1
            else:
                yield from _records(len(index.names), document.content)
                self._sha256.update(f"{STORED_NAMES[split]} {len(document.content)}\n".encode() + document.content)
                index.names.append(document.name)
                index.lengths.append(len(document.content))
        if not index.names:
            raise UsageError(_empty_split_message(self._source.name, split, num_elsewhere))


def _records(document: int, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for part, start in enumerate(range(0, len(content), RECORD_BYTES)):
        piece = np.frombuffer(content[start : start + RECORD_BYTES], dtype=np.uint8)
        yield f"{document}/{part}", {"document": document, "part": part, "content": piece}


def _empty_split_message(source: str, split: Split, num_elsewhere: int) -> str:
    return (
        f"{source}: the {split} split has no documents and the other {num_elsewhere}; one document in ten is "
        "held out, chosen by content, so a corpus needs about 50; cut long files up "
        "(`mkdir pieces && split -b 64k FILE pieces/`) and set --config.data.source='files:pieces/*'")


def _record_numbers(records: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> list[int]:
    """Finds the record of every part: TFDS orders records by a hash of their keys."""
    num_parts = -(-np.asarray(lengths) // RECORD_BYTES)
    first_part = np.cumsum(num_parts) - num_parts
    numbers = np.full(num_parts.sum(), -1)
    for number in range(len(records)):
        record = records[number]
        numbers[first_part[record["document"]] + record["part"]] = number
    assert (numbers >= 0).all(), "a part was generated but not written"
    return numbers.tolist()
