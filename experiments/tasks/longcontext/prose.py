"""Ordinary text of any length as token ids: whole documents, joined in an order that a seed draws."""
import functools
import hashlib
import platform
from collections.abc import Sequence

import numpy as np

from experiments.data.sources import open_source
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UsageError

TOPICS = "topics"        # the help articles that come with Python
SEPARATOR = b"\n\n"      # after every document


class Prose:
    """Texts of any length, a new one for every draw.

    The text of a draw is written backwards: a longer one has the same end, and more documents before it.

    Attributes:
      facts: where the text comes from, as JSON values.
    """

    def __init__(self, documents: Sequence[bytes], tokenizer: Tokenizer, *, seed: int = 0, name: str = "") -> None:
        """Keeps the documents; `name` says in messages and results where they come from.

        Raises:
          UsageError: no document has any text.
        """
        self._documents = [text for text in (document.strip() for document in documents) if text]
        if not self._documents:
            raise UsageError(f"--source={name} has no text; name another")
        self._seed, self._encode = seed, functools.cache(
            lambda index: tokenizer.encode(self._documents[index] + SEPARATOR))
        digest = hashlib.sha256(b"\0".join(self._documents)).hexdigest()
        self.facts = {"source": name, "documents": len(self._documents), "sha256": digest}

    @classmethod
    def of_source(cls, source: str, tokenizer: Tokenizer, *, seed: int, held_out: bool) -> "Prose":
        """Reads the documents of "topics", or of a source of `experiments.data`.

        Args:
          held_out: of a source of `experiments.data`, only the documents held out of training.
        Raises:
          UsageError: there is no such source, or no text in it.
        """
        if source == TOPICS:
            from pydoc_data import topics

            documents = [text.encode() for _, text in sorted(topics.topics.items())]
            name = f"help articles of Python {platform.python_version()}"
            return cls(documents, tokenizer, seed=seed, name=name)
        if not source:
            raise UsageError(f"--source is empty; it can be {TOPICS}, the help articles that come with Python, "
                             "stdlib, files:GLOB or tfds:NAME")
        documents = [each.content for each in open_source(source).documents()
                     if not held_out or each.split == "held_out"]
        return cls(documents, tokenizer, seed=seed, name=f"{source}, held out" if held_out else source)

    def last(self, draw: int, count: int) -> np.ndarray:
        """Returns the last `count` tokens of the text of a draw, int32 [count].

        Raises:
          UsageError: all documents together are shorter.
        """
        # RandomState rather than Generator: numpy promises never to change its numbers.
        order = np.random.RandomState([self._seed, draw]).permutation(len(self._documents))
        pieces, total = [], 0
        for index in order:
            if total >= count:
                break
            pieces.append(self._encode(int(index)))
            total += len(pieces[-1])
        if total < count:
            raise UsageError(f"--source={self.facts['source']} has {total:,} tokens of text, and a context needs "
                             f"{count:,}; name a longer one, or give shorter --lengths")
        return np.concatenate(pieces[::-1])[total - count :].astype(np.int32)
