"""The one interface between text and token ids: bytes themselves, or a byte-level BPE from a tokenizer.json.

A token stands for a fixed number of bytes wherever it is, so the byte offsets of tokens are the running sum of
`num_bytes[ids]`, and results per token become results per byte. Decoding what was encoded gives the same bytes.
"""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from experiments.errors import UsageError
from hnet import BOS


class Tokenizer(Protocol):
    """Text as bytes to token ids, and back.

    Attributes:
      unit: a token's name in messages: "byte" or "token".
      vocab_size: ids are below it.
      bos: put ahead of every document; None = nothing is.
      eos: ends a text that a model writes; None = nothing does.
      fingerprint: equal ones encode alike.
      num_bytes: [vocab_size] int32, bytes of text that each token stands for; a special one counts its literal.
    """

    unit: str
    vocab_size: int
    bos: int | None
    eos: int | None
    fingerprint: str
    num_bytes: np.ndarray

    def encode(self, text: bytes) -> np.ndarray:
        """Returns ids as int32 [n], without bos; raises UsageError for bytes that the vocabulary cannot write."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The inverse of `encode`; an id of no token stands for no bytes."""
        ...

    def without_unwritable(self, text: bytes) -> bytes:
        """Returns the text without the bytes that the vocabulary cannot write, for callers that count them."""
        ...

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> bytes:
        """Renders messages, {"role", "content"} each, up to where the model answers.

        Raises:
          UsageError: there is no chat template, or it refuses these messages.
        """
        ...


class ByteTokenizer:
    """The bytes of a text as they are; a document begins with a byte that UTF-8 never uses."""

    unit = "byte"
    vocab_size = 256
    bos: int | None = BOS
    eos: int | None = None
    fingerprint = "bytes"
    num_bytes = np.ones(256, np.int32)

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return np.asarray(ids, np.uint8).tobytes()

    def without_unwritable(self, text: bytes) -> bytes:
        return text

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> bytes:
        raise UsageError("a model of bytes has no chat template; write the prompt out")


def open_tokenizer(path: str, *, workdir: Path | None = None) -> Tokenizer:
    """Opens the tokenizer that config.data.tokenizer names.

    Args:
      path: "" for bytes; else a tokenizer.json, with tokenizer_config.json beside it or without.
      workdir: looked in for a relative path, before the current directory.
    Raises:
      UsageError: the file is missing, is no byte-level BPE, or needs a package that is not there.
    """
    if not path:
        return ByteTokenizer()
    from experiments.data.bpe_tokenizer import BPETokenizer

    return BPETokenizer(find_tokenizer(path, workdir))


def find_tokenizer(path: str, workdir: Path | None = None) -> Path:
    """Returns the absolute path of a tokenizer.json; raises UsageError that names the places looked in."""
    places = [base / Path(path).expanduser() for base in (workdir, Path.cwd()) if base is not None]
    for place in places:
        if place.is_file():
            return place.absolute()
    looked = " and ".join(str(place) for place in dict.fromkeys(places))
    hint = "name the file tokenizer.json in it" if any(map(Path.is_dir, places)) else (
        "name a tokenizer.json, or leave it empty for bytes")
    raise UsageError(f"config.data.tokenizer {path!r}: there is no such file (looked at {looked}); {hint}")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, name: str) -> None:
    """Raises UsageError if the tokenizer `name` has ids that a model of this `vocab_size` has no embedding for."""
    if tokenizer.vocab_size > vocab_size:
        raise UsageError(f"config.data.tokenizer {name!r} has ids up to {tokenizer.vocab_size - 1}, and "
                         f"config.model.vocab_size is {vocab_size}; set it to {tokenizer.vocab_size} or more, or "
                         "name the tokenizer that the model was made with")
