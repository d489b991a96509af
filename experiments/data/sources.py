"""Sources of text: each is a sequence of named documents, already assigned to their splits.

  stdlib       the library sources of the running Python, and its help articles: no download, no account
  files:GLOB   any files, one document each, as raw bytes (`**` recurses, `~` is the home directory)
  tfds:NAME    a data set that tensorflow-datasets has prepared as ArrayRecord, by name or by directory

A source knows nothing of tokens or windows; `corpus.py` makes it readable by document and byte range.
"""
import dataclasses
import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.errors import UsageError, suggest

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
STORED_NAMES: dict[Split, str] = {"train": "train", "held_out": "test"}  # in prepared corpora

FEWEST_STDLIB_FILES = 100
# Tests are mostly tables of cases. `pydoc_data` holds the help articles as string literals, which would put
# held-out articles into the training split.
STDLIB_LEFT_OUT = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "idlelib", "pydoc_data", "site-packages", "test", "tests"})


class Document(NamedTuple):
    name: str       # for display: a path, or "topics/assert"
    content: bytes  # may be empty; any encoding, or none
    split: Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Documents that can be read repeatedly, always in the same order."""

    name: str                                  # as printed, and part of the cache key
    paths: tuple[Path, ...]                    # the documents change only if these do
    documents: Callable[[], Iterator[Document]]


def open_source(source: str, *, text_key: str = "text") -> Source:
    """Finds the source named `source`; reads no document yet.

    Args:
      source: "stdlib", "files:GLOB" or "tfds:NAME", see the module docstring.
      text_key: the feature that holds the text; read by tfds sources only.
    Raises:
      UsageError: the source does not exist, or nothing in it can be read.
    """
    kind, _, where = source.partition(":")
    if source == "stdlib":
        return _stdlib()
    if kind == "files" and where:
        return _files(where)
    if kind == "tfds" and where:
        return _tfds(where, text_key)
    raise UsageError(f"--config.data.source={source} is not a source of text; it can be stdlib, "
                     "files:GLOB (such as 'files:~/books/**/*.txt') or tfds:NAME")


def split_by_content(content: bytes) -> Split:
    """Holds out one document in ten.

    The choice depends on the content, not on the name: a file is in the same split on every machine, in every
    directory and beside any other files, and a copy of a training document is never held out.
    """
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "big") % 10 == 0 else "train"


def _stdlib() -> Source:
    name = f"stdlib of Python {platform.python_version()}"
    root = Path(sysconfig.get_path("stdlib"))
    paths = tuple(sorted(_library_files(root)))
    if len(paths) < FEWEST_STDLIB_FILES:
        raise UsageError(f"this Python has {len(paths)} library sources under {root}, fewer than "
                         f"{FEWEST_STDLIB_FILES}, so it is stripped or zipped; train on your own text with "
                         "--config.data.source=files:GLOB")

    def documents() -> Iterator[Document]:
        from pydoc_data import topics

        for path in paths:
            yield _document(path.relative_to(root).as_posix(), _read(path))
        for topic, article in sorted(topics.topics.items()):
            yield _document(f"topics/{topic}", article.encode())

    return Source(name=name, paths=paths, documents=documents)


def _library_files(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - STDLIB_LEFT_OUT)
        yield from (Path(directory, name) for name in names if name.endswith(".py"))


def _files(pattern: str) -> Source:
    matches = set(glob.glob(os.path.expanduser(pattern), recursive=True))
    paths = tuple(sorted(Path(match) for match in matches if not os.path.isdir(match)))
    if not paths:
        raise UsageError(f"no file matches {pattern!r} (looked in {os.getcwd()}); "
                         "change --config.data.source, and quote it so that the shell does not expand the *")
    if not any(file_stat(path).st_size for path in paths):
        raise UsageError(f"all files that match {pattern!r} are empty ({len(paths)} of them); "
                         "change --config.data.source")

    def documents() -> Iterator[Document]:
        for path in paths:
            yield _document(path.as_posix(), _read(path))

    return Source(name=f"files:{pattern}", paths=paths, documents=documents)


def _document(name: str, content: bytes) -> Document:
    return Document(name, content, split_by_content(content))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def file_stat(path: Path) -> os.stat_result:
    """Returns `path.stat()`; raises a UsageError that names the file if it cannot be reached."""
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot read {path}: {error.strerror}; "
                      "fix its permissions, or exclude it in --config.data.source")


def _tfds(where: str, text_key: str) -> Source:
    """Holds out the data set's own validation (otherwise test) split; a set without one is split by content."""
    builder = _prepared_builder(where)
    splits = builder.info.splits
    other = next((name for name in ("validation", "test") if name in splits), None)
    own_splits: dict[str, Split] = {}
    if other and "train" in splits:
        own_splits = {"train": "train", other: "held_out"}
    records = {name: _random_access(builder, name) for name in own_splits or sorted(splits)}
    for record in (source[0] for source in records.values() if len(source)):
        _text(record, text_key, where)  # a wrong key is refused before any work

    def documents() -> Iterator[Document]:
        for name, source in records.items():
            for i in range(len(source)):
                content = _text(source[i], text_key, where)
                yield Document(f"{name}/{i}", content, own_splits.get(name) or split_by_content(content))

    paths = tuple(sorted(path for path in Path(builder.data_path).rglob("*") if path.is_file()))
    return Source(name=f"tfds:{where}, feature {text_key}", paths=paths, documents=documents)


def _prepared_builder(where: str) -> Any:
    import tensorflow_datasets as tfds

    directory = Path(where).expanduser()
    try:
        builder = tfds.builder_from_directory(directory) if directory.is_dir() else tfds.builder(where)
    except Exception as error:  # a name that does not fit raises anything from AssertionError to ImportError
        reason = str(error).strip().partition("\n")[0]
        hint = suggest(where, tfds.list_builders(with_community_datasets=False))
        raise UsageError(
            f"TFDS cannot open {where!r} ({reason}){hint}; --config.data.source=tfds:NAME takes "
            f"a name it knows, or the directory with dataset_info.json that `{_build_line('NAME')}` makes"
        ) from error
    if not builder.is_prepared():
        raise UsageError(
            f"{where} is not prepared under {builder.data_path}; run `{_build_line(where)}`, or name the "
            "directory where it is (set TFDS_DATA_DIR, or --config.data.source=tfds:DIRECTORY)")
    return builder


def _random_access(builder: Any, split: str) -> Sequence[Mapping[str, Any]]:
    try:
        return builder.as_data_source(split, file_format="array_record")
    except (NotImplementedError, ValueError) as error:
        name = builder.info.full_name
        raise UsageError(
            f"{name} is prepared as {builder.info.file_format.value}, which cannot be read here; run "
            f"`{_build_line(name)} --data_dir=ELSEWHERE` and set --config.data.source=tfds:ELSEWHERE/{name}"
        ) from error


def _build_line(name: str) -> str:
    return f"tfds build {name} --file_format=array_record"


def _text(record: Mapping[str, Any], text_key: str, where: str) -> bytes:
    text = record.get(text_key)
    if isinstance(text, str):
        return text.encode()
    if isinstance(text, bytes):
        return text
    textual = [key for key, value in record.items() if isinstance(value, str | bytes)]
    raise UsageError(f"tfds:{where} has no text under {text_key!r}; set --config.data.text_key to one of: "
                     f"{', '.join(textual) or '(none of its features is text)'}")
