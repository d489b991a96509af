"""Builds the tokenizer of a GGUF file from the vocabulary and merges in its metadata."""
from collections.abc import Sequence
from typing import Any

from experiments.data.bpe_tokenizer import import_tokenizers
from experiments.errors import UsageError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
PRE_TOKENIZERS = {
    "gpt-2": "letters, digits and others apart, each with a space before it",
    "smollm": "every digit alone, and then as gpt-2",
}


def build_tokenizer(tokens: Sequence[str], merges: Sequence[str], token_types: Sequence[int], pre: str) -> Any:
    """Returns a `tokenizers.Tokenizer` whose ids are those of the file.

    Args:
      tokens: tokenizer.ggml.tokens, in the alphabet of bytes.
      merges: tokenizer.ggml.merges, two tokens with a space between, first ones first.
      token_types: tokenizer.ggml.token_type, one per token; control tokens are cut out of a text literally.
      pre: tokenizer.ggml.pre, the rule that cuts a text into words.
    Raises:
      UsageError: a rule that is not reproduced here, or lists that do not fit each other.
    """
    if pre not in PRE_TOKENIZERS:
        raise UsageError(f"tokenizer.ggml.pre {pre!r} is not reproduced here, only {', '.join(PRE_TOKENIZERS)}; "
                         "bring the model's tokenizer.json")
    if len(token_types) != len(tokens):
        raise UsageError(f"tokenizer.ggml.token_type has {len(token_types)} entries for {len(tokens)} tokens")
    tokenizers = import_tokenizers()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UsageError(f"tokenizer.ggml.tokens has {len(tokens) - len(vocabulary)} tokens twice")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2 or any(part not in vocabulary for part in (*pair, "".join(pair))):
            raise UsageError(f"tokenizer.ggml.merges has {merge!r}, which does not join two tokens into a third")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        words = tokenizers.pre_tokenizers.Sequence([digits, words])
    made.pre_tokenizer = words
    made.decoder = tokenizers.decoders.ByteLevel()
    for token, kind in zip(tokens, token_types, strict=True):
        added = tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
        if kind == CONTROL:
            made.add_special_tokens([added])
        elif kind == USER_DEFINED:
            made.add_tokens([added])
        elif kind not in (NORMAL, UNUSED):
            raise UsageError(f"tokenizer.ggml.token_type {kind} of {token!r} is not known here; "
                             "bring the model's tokenizer.json")
    return made
