"""A byte-level BPE of a few hundred tokens, as the metadata of a GGUF file would have it and as files."""
import itertools
import json
from functools import cache
from pathlib import Path

from experiments.data.bpe_tokenizer import byte_alphabet
from experiments.data.gguf_vocabulary import build_tokenizer

SPECIAL = ("<|pad|>", "<|user|>", "<|end|>")
MISSING = b"\x04\xc0\xf2\xff"  # bytes without a token
WORDS = (" the", " and", " of", "ing", " in", " is", "return", " self", "def ", "import", "    ", " a", "er", "12")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|user|>' + message['role'] + '\n' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|user|>model\n' }}{% endif %}")


def vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Returns tokens, merges and token types: special tokens, single bytes, and the beginnings of WORDS."""
    letter = {byte: character for character, byte in byte_alphabet().items()}
    tokens = [*SPECIAL, *(letter[byte] for byte in range(256) if byte not in MISSING)]
    merges = []
    for word in WORDS:
        letters = [letter[byte] for byte in word.encode()]
        for part, following in zip(itertools.accumulate(letters), letters[1:], strict=False):
            if part + following not in tokens:
                tokens.append(part + following)
                merges.append(f"{part} {following}")
    return tokens, merges, [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))


@cache
def tokenizer_json(pre: str = "smollm") -> str:
    return build_tokenizer(*vocabulary(), pre).to_str()


def write_tokenizer(directory: Path, *, pre: str = "smollm", **config) -> Path:
    """Writes tokenizer.json and, of these fields besides the usual ones, tokenizer_config.json; returns the first.

    A field that is None is left out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tokenizer.json"
    path.write_text(tokenizer_json(pre))
    fields = {"bos_token": "<|user|>", "eos_token": "<|end|>", "add_bos_token": False,
              "chat_template": CHAT_TEMPLATE} | config
    kept = {name: value for name, value in fields.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(kept))
    return path
