"""A corpus: named documents in two splits; any slice of one can be read without reading the rest.

It is prepared on first use, in a directory named by a hash of the files that the source reads, so a changed
file leads to another directory. A directory appears under its final name complete or not at all.
"""
import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.sources import STORED_NAMES, Source, Split, file_stat, open_source
from experiments.errors import UsageError

FORMAT_VERSION = 1  # of the prepared directory; a change here prepares every corpus anew
DECODED_RECORDS = 2048  # kept per split: at most 128 MiB


def load_corpus(source: str, *, text_key: str = "text", cache_dir: str | None = None) -> "Corpus":
    """Opens the corpus that `source` names, and prepares it on first use.

    Args:
      source: "stdlib", "files:GLOB" or "tfds:NAME", see `sources.py`.
      text_key: the feature that holds the text; read by tfds sources only.
      cache_dir: where prepared corpora are kept; None or "" means $XDG_CACHE_HOME/hnet-jax/data, or
        ~/.cache/hnet-jax/data.
    Raises:
      UsageError: the source is missing, unreadable or too small, or `cache_dir` cannot be written.
    """
    opened = open_source(source, text_key=text_key)
    root = Path(cache_dir).expanduser() if cache_dir else _default_cache_dir()
    directory = root / _cache_key(opened)
    if not directory.exists():
        _prepare(opened, directory)
    return Corpus(directory)


class Corpus:
    """A prepared corpus on disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
        # {"files", "bytes", "sha256", "skipped_empty"}; see ByteText.fingerprint.
        self.fingerprint: dict[str, Any] = index["fingerprint"]
        self._splits = {
            split: DocumentSplit(directory, split, record_bytes=index["record_bytes"], **index[stored])
            for split, stored in STORED_NAMES.items()
        }

    def split(self, name: Split) -> "DocumentSplit":
        return self._splits[name]


class DocumentSplit:
    """The documents of one split. The first `read` opens the files; any thread may read."""

    def __init__(
        self,
        directory: Path,
        split: Split,
        *,
        record_bytes: int,
        names: list[str],
        lengths: list[int],
        records: list[int],
    ) -> None:
        self.names = names
        self.lengths = np.asarray(lengths, dtype=np.int64)  # bytes per document
        num_parts = -(-self.lengths // record_bytes)
        self._first_part = np.cumsum(num_parts) - num_parts
        self._record_of_part = records
        self._record_bytes = record_bytes
        self._directory, self._split = directory, split
        self._decoded = functools.lru_cache(maxsize=DECODED_RECORDS)(self._decode)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Returns bytes `start` to `stop` of a document, uint8 [stop - start]; decodes only their parts."""
        if not 0 <= start <= stop <= self.lengths[document]:
            raise IndexError(f"bytes {start}:{stop} are not within the {self.lengths[document]} bytes of document "
                             f"{document}, {self.names[document]}")
        first, last = start // self._record_bytes, max(start, stop - 1) // self._record_bytes
        pieces = [self._decoded(int(self._first_part[document]) + part) for part in range(first, last + 1)]
        content = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        offset = first * self._record_bytes
        return content[start - offset : stop - offset]

    def _decode(self, part: int) -> np.ndarray:
        return self._records[self._record_of_part[part]]["content"]

    @functools.cached_property
    def _records(self) -> Sequence[Mapping[str, Any]]:
        from experiments.data.byte_text import open_records

        return open_records(self._directory, self._split)


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hnet-jax" / "data"


def _cache_key(source: Source) -> str:
    """Returns a readable name and a hash of everything the documents depend on."""
    stats = [(os.path.abspath(path), file_stat(path)) for path in source.paths]
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, source.name, files]).encode()).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", source.name).strip("-.")[:40]
    return f"{slug}-{digest[:16]}"


def _prepare(source: Source, directory: Path) -> None:
    from experiments.data.byte_text import prepare

    size = sum(file_stat(path).st_size for path in source.paths)
    print(f"preparing {source.name}: {len(source.paths)} files, {size / 1e6:.1f} MB, "
          f"once, into {directory}", flush=True)
    start = time.perf_counter()
    with appears_whole(directory) as made:
        prepare(source, made)
    print(f"prepared {source.name} in {time.perf_counter() - start:.1f} s", flush=True)


@contextlib.contextmanager
def appears_whole(directory: Path) -> Iterator[Path]:
    """Yields the path of a directory to be made, which becomes `directory` only when all is written.

    Raises:
      UsageError: something there cannot be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # A sibling: renaming is atomic within one file system.
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".preparing-") as temporary:
            made = Path(temporary, "corpus")
            yield made
            _rename_unless_taken(made, directory)
    except OSError as error:
        raise UsageError(f"cannot prepare a corpus under {directory.parent}: {error}; "
                         "set --config.data.cache_dir to a writable directory with enough space") from error


def _rename_unless_taken(made: Path, directory: Path) -> None:
    """Renames `made`; if another process has prepared the same corpus meanwhile, keeps that one."""
    try:
        made.rename(directory)
    except OSError:
        if not directory.exists():
            raise
