"""Continues many texts at once: one program for a prompt length, one for every token after it.

  state         = init_decode_state(config, batch, max_length)
  logits, state = prefill(model, params, tokens, segment_ids, state)      any number of times
  logits, state = step(model, params, token, state)                       any number of times

`prefill` and `step` are pure functions, to be compiled by their caller; `generate` and `generate_text` are loops
around them.
"""
import codecs
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hnet.decode_state import DecodeState, init_decode_state
from hnet.model import HNetLM
from hnet.sampling import Sampling, sample

SMALLEST_PIECE, LARGEST_PIECE = 16, 1024  # prompts are read in pieces of a power of two
PLAIN = Sampling()
BOS = 254  # a byte that UTF-8 never uses; the release begins documents with it


def prefill(
    model: HNetLM,
    params: Any,
    tokens: jax.Array,
    segment_ids: jax.Array,
    state: DecodeState,
    *,
    boundary_levels: jax.Array | None = None,
) -> tuple[jax.Array, DecodeState]:
    """Reads tokens [b, t] of every row and returns the logits [b, vocab] after each row's last one.

    Args:
      segment_ids: [b, t], 1 = a token, 0 = padding, on whichever side. A row of padding stays as it is; its logits
        mean nothing.
      boundary_levels: [b, t], for stages whose router is "given".
    """
    output = model.apply({"params": params}, tokens, segment_ids, state, boundary_levels=boundary_levels,
                         logits_of="last")
    return output.logits[:, 0], output.state


def step(
    model: HNetLM,
    params: Any,
    token: jax.Array,
    state: DecodeState,
    is_active: jax.Array | None = None,
    *,
    boundary_levels: jax.Array | None = None,
) -> tuple[jax.Array, DecodeState]:
    """Reads one token [b] of every row and returns the logits [b, vocab] after it.

    The stages within run only if some row begins a chunk, and change the rows that do.

    Args:
      is_active: [b] bool; rows that are not stay as they are. None = all are.
      boundary_levels: [b], for stages whose router is "given".
    """
    is_active = jnp.ones(token.shape, bool) if is_active is None else is_active
    segment_ids = is_active[:, None].astype(jnp.int32)
    levels = None if boundary_levels is None else boundary_levels[:, None]
    return prefill(model, params, token[:, None], segment_ids, state, boundary_levels=levels)


def generate(
    model: HNetLM,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    sampling: Sampling = PLAIN,
    seeds: Sequence[int] | None = None,
    eos: int | None = None,
    num_allowed: int | None = None,
    max_length: int = 0,
) -> Iterator[np.ndarray]:
    """Yields the next token of every prompt, [b] int32, up to `num_tokens` times.

    A row depends on its own prompt and seed alone, whatever else is in the batch. Long prompts are read in pieces,
    so that attention never needs memory for all of one at once.

    Args:
      prompts: token ids, at least one per row; rows may differ in length.
      seeds: one per row; None means 0, 1, 2, ...
      eos: the token that ends a row. Such a row yields -1 from then on, and all rows ended end the iteration.
      num_allowed: only tokens below this are drawn; None = the whole vocabulary.
      max_length: tokens to make room for, as in `init_decode_state`; 0 = as many as are needed, rounded up.
    Raises:
      ValueError: an empty prompt, not one seed per prompt, no room, more tokens than the model's context, or
        boundaries that would have to be given.
    """
    if any(stage.chunking.router == "given" for stage in model.config.stages[:-1]):
        raise ValueError('a model with the router "given" does not know where the text to come will have '
                         "boundaries; loop over `step` with boundary_levels")
    lengths = np.array([len(prompt) for prompt in prompts])
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("every prompt needs at least one token; begin a new document with the model's BOS")
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
    size = min(max(SMALLEST_PIECE, 1 << int(lengths.max() - 1).bit_length()), LARGEST_PIECE)
    needed = int(lengths.max()) + num_tokens
    if 0 < max_length < needed:
        raise ValueError(f"max_length {max_length} has no room for {lengths.max()} tokens and {num_tokens} more; "
                         f"it must be at least {needed}, or 0")
    context = model.config.context_length
    if context is not None and needed > context:
        raise ValueError(
            f"{lengths.max()} tokens and {num_tokens} more are {needed}, past the model's context_length "
            f"{context}; ask for at most {max(context - int(lengths.max()), 0)} more, or shorten the prompt")
    # Rounded up, so that asking for a few more tokens does not compile anew.
    state = init_decode_state(model.config, len(prompts), max_length or -(-needed // size) * size)

    programs = _programs(model, sampling, num_allowed)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    logits = np.zeros((len(prompts), model.config.vocab_size), np.float32)
    for tokens, segment_ids in _pieces(prompts, size):
        logits, state = programs.read(params, tokens, segment_ids, state, logits)
    active = np.ones(len(prompts), bool)
    for index in range(num_tokens):
        if index == 0:
            token = programs.first(logits, keys)
        else:
            token, state = programs.next(params, token, active, state, keys, index)
        drawn = np.where(active, token, -1)
        yield drawn
        if eos is not None:
            active &= drawn != eos
            if not active.any():
                return


class TextTokenizer(Protocol):
    """Text as tokens: `bos` is put ahead of a document, `eos` ends one; None where there is no such token."""

    bos: int | None
    eos: int | None
    vocab_size: int

    def encode(self, text: bytes) -> Iterable[int]: ...

    def decode(self, ids: Sequence[int]) -> bytes: ...


def generate_text(
    model: HNetLM,
    params: Any,
    prompts: Sequence[str],
    *,
    num_bytes: int | None = None,
    bos: int = BOS,
    tokenizer: TextTokenizer | None = None,
    num_tokens: int | None = None,
    **options: Any,
) -> Iterator[list[str]]:
    """Streams text: yields, token after token, what each row's text has gained, which is seldom nothing.

    A character comes when its last byte has; bytes that are not UTF-8 come as U+FFFD. Joined, a row's strings are
    the decoding of its bytes.

    Args:
      prompts: text to continue; "" begins a new document.
      num_bytes: bytes to add, by a model of bytes.
      bos: the byte ahead of every prompt of a model of bytes.
      tokenizer: of a model of tokens; None = tokens are bytes. Its eos ends a text, and is not in it.
      num_tokens: tokens to add, with a tokenizer.
      options: of `generate`.
    Raises:
      ValueError: num_bytes with a tokenizer, or num_tokens without; besides, as `generate` does.
    """
    if (tokenizer is None) != (num_tokens is None) or (num_tokens is None) == (num_bytes is None):
        raise ValueError(f"num_bytes {num_bytes} and num_tokens {num_tokens}: give num_bytes for a model of "
                         "bytes, and num_tokens together with a tokenizer")
    readers = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]
    for reader, prompt in zip(readers, prompts, strict=True):
        reader.decode(_to_bytes(prompt))  # a character may begin in the prompt
    if tokenizer is None:
        begin, eos, encode, decode = [bos], None, list, bytes
        settings = {"num_tokens": num_bytes, "num_allowed": 256}
    else:
        begin, eos, encode, decode = [tokenizer.bos], tokenizer.eos, tokenizer.encode, tokenizer.decode
        settings = {"num_tokens": num_tokens, "num_allowed": tokenizer.vocab_size, "eos": eos}
    begin = [token for token in begin if token is not None]
    tokens = [[*begin, *encode(_to_bytes(prompt))] for prompt in prompts]
    for drawn in generate(model, params, tokens, **settings | options):
        yield [reader.decode(b"" if token in (-1, eos) else decode([token]))
               for reader, token in zip(readers, drawn.tolist(), strict=True)]
    yield [reader.decode(b"", final=True) for reader in readers]


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # as the command line hands over bytes that are not UTF-8


def _pieces(prompts: Sequence[Sequence[int]], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts prompts into (tokens, segment ids), both [b, size]; shorter ones are padded on the right."""
    for start in range(0, max(map(len, prompts)), size):
        tokens, segment_ids = np.zeros((2, len(prompts), size), np.int32)
        for row, prompt in enumerate(prompts):
            piece = prompt[start : start + size]
            tokens[row, : len(piece)], segment_ids[row, : len(piece)] = piece, 1
        yield tokens, segment_ids


class _Programs:
    """The compiled functions of one model and one way to sample."""

    def __init__(self, model: HNetLM, sampling: Sampling, num_allowed: int | None) -> None:
        @partial(jax.jit, donate_argnums=3)
        def read(params, tokens, segment_ids, state, logits):
            fresh, state = prefill(model, params, tokens, segment_ids, state)
            return jnp.where(jnp.any(segment_ids != 0, axis=1)[:, None], fresh, logits), state

        @jax.jit
        def first(logits, keys):
            return draw(logits, keys, 0)

        @partial(jax.jit, donate_argnums=3)
        def next_(params, token, active, state, keys, index):
            logits, state = step(model, params, token, state, active)
            return draw(logits, keys, index), state

        def draw(logits, keys, index):
            row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            return sample(logits[:, :num_allowed], row_keys, sampling)

        self.read, self.first, self.next = read, first, next_


_programs = cache(_Programs)
