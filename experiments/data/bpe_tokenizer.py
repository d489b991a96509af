"""Byte-level BPE of the package `tokenizers`, held to losing nothing: decode(encode(text)) == text for any bytes.

Text that is UTF-8 goes through the package. Bytes that are not UTF-8 become the tokens of those single bytes. A
normalizer would change the text, so that of unicode composition (NFC) is left out: text in another form keeps its
own bytes, where other programs change it first. Other normalizers are refused.
"""
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from experiments.data.chat_template import render_chat_template
from experiments.errors import UsageError
from experiments.files import write_whole

NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # as surrogateescape writes bytes that are not UTF-8
PROBE = "Two  words\n\t1234 it's \u00e9\u4e2d\U0001f600"


class BPETokenizer:
    """A tokenizer.json, with the special tokens and the chat template of the tokenizer_config.json beside it."""

    unit = "token"

    def __init__(self, path: Path) -> None:
        """Reads the files; raises UsageError if they are not those of a byte-level BPE."""
        tokenizers, text = import_tokenizers(), _read(path)
        try:
            fields = json.loads(text)
            _check_kind(fields)
            fields["normalizer"] = None
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(fields))
            # Settings of the file that would cut texts off, or fill them up.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._pieces = _token_bytes(fields, self._tokenizer)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
        except Exception as error:  # the package raises plain Exception, and JSON may hold anything
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"{path} is not a tokenizer.json: {type(error).__name__}: {reason}") from error
        self.path, self._text = path, text
        self.vocab_size = len(self._pieces)
        self.num_bytes = np.array([len(piece) for piece in self._pieces], np.int32)
        self._config_path = path.with_name("tokenizer_config.json")
        self._config = _read_config(self._config_path)
        self.eos = self._special("eos_token")
        self.bos = self._find_bos()
        self.fingerprint = hashlib.sha256(f"bos {self.bos}\n{text}".encode()).hexdigest()
        self._encode_writable(self.without_unwritable(PROBE.encode()))  # a file that loses text is refused now

    def copy_to(self, directory: Path) -> None:
        """Writes the files that were read into `directory`, under the names that others look for."""
        files = {"tokenizer.json": self._text}
        if self._config_path.is_file():
            files[self._config_path.name] = _read(self._config_path)
        for name, text in files.items():
            write_whole(directory / name, text)

    def encode(self, text: bytes) -> np.ndarray:
        unwritable = self._unwritable(text)
        if unwritable:
            named = " ".join(f"{byte:02x}" for byte in unwritable)
            first = next(offset for offset, byte in enumerate(text) if byte in unwritable)
            raise UsageError(f"the text has bytes that the vocabulary of {self.path} cannot write: {named} (hex), "
                             f"the first at byte {first}; leave them out")
        return self._encode_writable(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return b"".join([self._pieces[index] for index in ids])

    def without_unwritable(self, text: bytes) -> bytes:
        return text.translate(None, delete=bytes(set(range(256)) - self._single.keys()))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> bytes:
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several by name
            template = {each["name"]: each["template"] for each in template}.get("default")
        if not template:
            raise UsageError(f"{self._config_path} has no chat_template; write the prompt out")
        tokens = {name: _content(self._config.get(name)) or "" for name in ("bos_token", "eos_token")}
        try:
            return render_chat_template(template, messages, **tokens)
        except UsageError as error:
            raise UsageError(f"{self._config_path}: {error}") from error

    def _encode_writable(self, text: bytes) -> np.ndarray:
        ids: list[int] = []
        for index, run in enumerate(NOT_UTF8.split(text.decode("utf-8", "surrogateescape"))):
            is_stray = index % 2 == 1
            ids += [self._single[ord(byte) - 0xDC00] for byte in run] if is_stray else self._encode_whole(run)
        if self.decode(ids) != text:
            raise UsageError(f"{self.path} does not give a text back as it was (it may put a space ahead of it "
                             "or strip some); only tokenizers that lose nothing are read")
        return np.array(ids, np.int32)

    def _encode_whole(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def _single(self) -> dict[int, int]:
        """Maps each byte that the vocabulary can write to the token of that byte alone."""
        return {piece[0]: index for index, piece in reversed(list(enumerate(self._pieces))) if len(piece) == 1}

    def _unwritable(self, text: bytes) -> list[int]:
        return sorted(set(text) - self._single.keys())

    def _find_bos(self) -> int | None:
        """Returns the token ahead of documents: as `add_bos_token` says or, without it, as tokenizer.json does."""
        if "add_bos_token" not in self._config:
            plain, whole = self._encode_whole("a"), self._tokenizer.encode("a", add_special_tokens=True).ids
            return whole[0] if len(whole) > len(plain) and whole[1 : 1 + len(plain)] == plain else None
        if not self._config["add_bos_token"]:
            return None
        bos = self._special("bos_token")
        if bos is None:
            raise UsageError(f"{self._config_path}: add_bos_token is set, and there is no bos_token; add it")
        return bos

    def _special(self, name: str) -> int | None:
        content = _content(self._config.get(name))
        found = None if content is None else self._tokenizer.token_to_id(content)
        if content is not None and found is None:
            raise UsageError(f"{self._config_path}: {name} {content!r} is not in the vocabulary of {self.path}")
        return found


def import_tokenizers() -> ModuleType:
    """Imports the package `tokenizers`; raises UsageError with the way to get it."""
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError("a tokenizer.json needs the package tokenizers; "
                         "pip install 'hnet-jax[pretrained]'") from error
    return tokenizers


def byte_alphabet() -> dict[str, int]:
    """Maps each character that stands for a byte in a byte-level vocabulary to that byte.

    Bytes that show as themselves in Latin-1 do so, the others follow in order from U+0100: GPT-2's alphabet.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + rank): byte for rank, byte in enumerate(hidden)}


def _check_kind(fields: Any) -> None:
    model = fields["model"]
    normalizer = (fields.get("normalizer") or {}).get("type", "NFC")
    added = fields.get("added_tokens", ())
    problems = {
        f"its model is {model.get('type', 'BPE')!r}": model.get("type", "BPE") != "BPE",
        "its BPE has dropout": model.get("dropout"),
        "its BPE falls back to bytes": model.get("byte_fallback"),
        "its BPE marks the ends of words": model.get("end_of_word_suffix") or model.get(
            "continuing_subword_prefix"),
        f"its normalizer {normalizer!r} changes the text": normalizer != "NFC",
        "its added tokens take in blanks beside them": any(
            token.get("lstrip") or token.get("rstrip") for token in added),
    }
    for problem, is_there in problems.items():
        if is_there:
            raise UsageError(f"{problem}; only byte-level BPE that loses nothing is read")


def _token_bytes(fields: Mapping[str, Any], tokenizer: Any) -> list[bytes]:
    """Returns the bytes that each id stands for; b"" for ids of no token."""
    alphabet = byte_alphabet()
    literal = {token["id"]: token["content"].encode() for token in fields.get("added_tokens", ())}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (1 + max(vocabulary.values(), default=-1))
    for token, index in vocabulary.items():
        if index in literal:
            pieces[index] = literal[index]
        elif all(character in alphabet for character in token):
            pieces[index] = bytes(alphabet[character] for character in token)
        else:
            raise UsageError(f"its token {token!r} (id {index}) is not written in the alphabet of bytes; only "
                             "byte-level BPE is read")
    return pieces


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(_read(path))
        if not isinstance(fields, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise UsageError(f"{path} is not a tokenizer_config.json: {error}") from error
    return fields


def _content(token: Any) -> str | None:
    """Returns the text of a special token, which a file holds as it is or as {"content": text}."""
    return token.get("content") if isinstance(token, dict) else token
