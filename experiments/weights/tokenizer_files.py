"""The two files of a tokenizer: from a GGUF file's vocabulary, or from a directory, to a run and on."""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.data.gguf_vocabulary import build_tokenizer
from experiments.data.tokenizer import check_vocabulary, find_tokenizer, open_tokenizer
from experiments.errors import UsageError
from experiments.weights.tensor_files import read_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_FIELDS = ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "chat_template")


def tokenizer_from_gguf(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of both files, by name.

    Raises:
      UsageError: the file has no byte-level BPE, or one that is not reproduced here.
    """
    def get(key: str) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}")

    if get("model") != "gpt2" or get("tokens") is None or get("merges") is None:
        raise UsageError(f"{path} has a tokenizer of kind {get('model')!r}, and only byte-level BPE (gpt2) is "
                         "built from a GGUF file; bring the model's tokenizer.json with --tokenizer=PATH")
    tokens = get("tokens")
    types, pre = get("token_type") or [1] * len(tokens), get("pre") or "gpt-2"
    try:
        built = build_tokenizer(tokens, get("merges"), types, pre)
    except UsageError as error:
        raise UsageError(f"{path}: {error}; name it with --tokenizer=PATH") from error
    ids = {name: get(f"{key}_token_id") for name, key in (
        ("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))}
    config: dict[str, Any] = {name: tokens[index] for name, index in ids.items() if index is not None}
    config["add_bos_token"] = bool(get("add_bos_token"))
    if metadata.get("tokenizer.chat_template"):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return {TOKENIZER: built.to_str(), TOKENIZER_CONFIG: _json(config)}


def tokenizer_from_files(path: Path) -> dict[str, str]:
    """Reads a tokenizer.json and, if they are beside it, tokenizer_config.json and chat_template.jinja.

    Raises:
      UsageError: a file is missing or not what it should be.
    """
    try:
        texts = {TOKENIZER: path.read_text(encoding="utf-8")}
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: {reason}; name a tokenizer.json with --tokenizer=PATH, or --tokenizer=none "
                         "for a model of bytes") from error
    settings, template = path.with_name(TOKENIZER_CONFIG), path.with_name("chat_template.jinja")
    config = read_json(settings) if settings.is_file() else {}
    config = {name: config[name] for name in _FIELDS if config.get(name) is not None}
    if template.is_file():
        config.setdefault("chat_template", template.read_text(encoding="utf-8"))
    return texts | ({TOKENIZER_CONFIG: _json(config)} if config else {})


def check_tokenizer(directory: Path, vocab_size: int) -> str:
    """Opens the tokenizer in `directory` and returns a sentence about its size.

    Raises:
      UsageError: it is no byte-level BPE, or the model has no embeddings for some of its tokens.
    """
    tokenizer = open_tokenizer(TOKENIZER, workdir=directory)
    check_vocabulary(tokenizer, vocab_size, TOKENIZER)
    unused = vocab_size - tokenizer.vocab_size
    return f"{tokenizer.vocab_size:,} tokens" + (f", {unused:,} fewer than embeddings" if unused else "")


def tokenizer_for_transformers(tokenizer: str, workdir: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Returns the texts of a run's tokenizer files by name, and the fields of config.json that name tokens.

    Args:
      tokenizer: config.data.tokenizer of the run; "" = bytes, for which there are no files.
    """
    if not tokenizer:
        return {}, {}
    path = find_tokenizer(tokenizer, workdir)
    texts = tokenizer_from_files(path)
    config = json.loads(texts.get(TOKENIZER_CONFIG, "{}"))
    fields = json.loads(texts[TOKENIZER])
    ids = fields["model"]["vocab"] | {entry["content"]: entry["id"] for entry in fields.get("added_tokens", [])}
    special = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if token in ids:
            special[f"{name}_id"] = ids[token]
    # The class that reads tokenizer.json as it is; others would put tokens of their own into a text.
    return texts | {TOKENIZER_CONFIG: _json(config | {"tokenizer_class": "PreTrainedTokenizerFast"})}, special


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
