"""All documents of a source in memory, with no split: for text that nothing is trained on."""
import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.data.sources import open_source
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UsageError


class DocumentList:
    """Documents as bytes or as ids, read as a DocumentSplit is."""

    def __init__(self, names: Sequence[str], documents: Sequence[np.ndarray]) -> None:
        self.names = list(names)
        self.lengths = np.array([len(document) for document in documents], np.int64)
        self._documents = documents

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return self._documents[document][start:stop]


@dataclasses.dataclass(frozen=True)
class SourceText:
    """The documents that were read of a source.

    Attributes:
      documents: in tokens.
      num_bytes: of their text, without what could not be written.
      num_documents: that the source has, which may be more than were read; empty ones are none.
      num_unwritable: bytes that the tokenizer's vocabulary cannot write, which were left out.
    """
    documents: DocumentList
    num_bytes: int
    num_documents: int
    num_unwritable: int


def read_source(source: str, tokenizer: Tokenizer, *, num_bytes: int, text_key: str = "text") -> SourceText:
    """Reads documents in a fixed random order until they have `num_bytes` bytes; the last one is cut there.

    The choice depends on the source and on `num_bytes` alone, so models with different tokens read the same text.

    Args:
      source: "stdlib", "files:GLOB" or "tfds:NAME", see `sources.py`; it may have any number of documents.
    Raises:
      UsageError: the source is missing, unreadable or without text.
    """
    opened = open_source(source, text_key=text_key)
    lengths = [len(document.content) for document in opened.documents()]  # twice, so that few are held at once
    if not any(lengths):
        raise UsageError(f"{opened.name} has no text: its {len(lengths)} documents are empty")
    order = np.random.RandomState(0).permutation(len(lengths))
    ends = np.cumsum(np.array(lengths)[order])
    wanted = {int(index): max(0, min(lengths[index], num_bytes - int(end) + lengths[index]))
              for index, end in zip(order, ends, strict=True)}
    names, documents, num_unwritable = [], [], 0
    for index, document in enumerate(opened.documents()):
        text = document.content[: _whole_characters(document.content, wanted[index])]
        writable = tokenizer.without_unwritable(text)
        num_unwritable += len(text) - len(writable)
        if writable:
            names.append(document.name)
            documents.append(tokenizer.encode(writable))
    if not names:
        raise UsageError(f"{opened.name} has no text that the tokenizer's vocabulary can write")
    written = sum(int(tokenizer.num_bytes[ids].sum()) for ids in documents)
    return SourceText(DocumentList(names, documents), written, sum(map(bool, lengths)), num_unwritable)


def _whole_characters(text: bytes, limit: int) -> int:
    """Returns `limit`, or up to 3 less where that would cut a UTF-8 character in two."""
    for length in range(limit, max(limit - 4, -1), -1):
        if length >= len(text) or text[length] & 0xC0 != 0x80:
            return length
    return limit  # not UTF-8
