"""Continues prompts, token by token: each is read once, and every token after it costs one step.

  python -m experiments.generate --workdir=runs/quickstart --prompt "def " [--length=200] [--temperature=0.7]
  python -m experiments.generate --workdir=runs/quickstart --prompt_file=notes.txt --top_p=0.9 --samples=4
  python -m experiments.generate --workdir=runs/smollm2 --chat --prompt "Why is the sky blue?"

Tokens are bytes, unless the run has a tokenizer. A text ends early at the tokenizer's end token.
Text streams as it comes if there is one sample; several are written one after the other.
"""
import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import commands
from experiments.config import RunConfig
from experiments.config.command_line import split_overrides
from experiments.data import Tokenizer
from experiments.errors import UsageError, run_command
from experiments.runs.saved_run import SavedRun
from hnet import HNetLM, Sampling, decode_state_bytes
from hnet import generate as generate_tokens

ROOM = 64  # tokens: caches are multiples of it, so that asking for a few more does not compile anew


def main(argv: list[str]) -> None:
    parser = commands.run_parser(__doc__, "generate", purpose="to use")
    parser.add_argument("--prompt", default="", help="text to continue; empty starts a new document")
    parser.add_argument("--prompt_file", type=Path, help="a file whose content is the prompt, of any length")
    parser.add_argument("--chat", action="store_true",
                        help="put the prompt as a user's message, by the model's chat template; prints the answer")
    parser.add_argument("--length", type=int, default=200,
                        help="number of tokens to add, which are bytes for a model of bytes")
    parser.add_argument("--temperature", type=float, default=0.7,
                        help="randomness of the draw; 0 always takes the most probable token")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k most probable tokens; 0 = from all")
    parser.add_argument("--top_p", type=float, default=1.0,
                        help="draw from the fewest tokens whose probabilities add up to p")
    parser.add_argument("--min_p", type=float, default=0.0,
                        help="leave out tokens less probable than this fraction of the most probable one")
    parser.add_argument("--samples", type=int, default=1, help="number of continuations, drawn in one batch")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the first sample; each further one has the next seed")
    with SavedRun.from_command_line(parser, argv) as saved:
        arguments = parser.parse_args(split_overrides(argv)[0])
        prompt, sampling = _check(arguments)
        config, tokenizer = saved.config, saved.tokenizer()
        ids = _prompt_ids(tokenizer, prompt, is_chat=arguments.chat)
        room = _room(config, len(ids), arguments.length)
        params = saved.params()
    if config.data.tokenizer:
        size = decode_state_bytes(config.model.at_full_capacity(), arguments.samples, room)
        print(f"the cache takes {size / 1e6:,.1f} MB: {arguments.samples} x {room:,} tokens", file=sys.stderr)
    pieces = generate_pieces(config, params, [ids] * arguments.samples, tokenizer, length=arguments.length,
                             sampling=sampling, seed=arguments.seed)
    _write(pieces, b"" if arguments.chat else prompt, arguments.samples, arguments.seed)
    window, total = config.data.sequence_length, len(ids) + arguments.length
    if total > window and config.model.context_length is None:
        print(f"note: {total} {tokenizer.unit}s with the prompt; the model was trained on windows of {window}",
              file=sys.stderr)


def generate_pieces(
    config: RunConfig, params: Any, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, *, length: int,
    sampling: Sampling, seed: int = 0,
) -> Iterator[list[bytes]]:
    """Yields the text that each prompt gains from one more token, up to `length` times: b"" after its end.

    Chunk capacity is full whatever the run trains with.

    Args:
      prompts: ids, as `prompt_ids` gives them.
    Raises:
      UsageError: more tokens than the model's context_length.
    """
    model = HNetLM(config.model.at_full_capacity())
    seeds = range(seed, seed + len(prompts))
    room = _room(config, max(map(len, prompts)), length) if config.data.tokenizer else 0
    for drawn in generate_tokens(model, params, prompts, num_tokens=length, sampling=sampling, seeds=seeds,
                                 num_allowed=tokenizer.vocab_size, eos=tokenizer.eos, max_length=room):
        yield [b"" if token < 0 or token == tokenizer.eos else tokenizer.decode([token])
               for token in drawn.tolist()]


def prompt_ids(tokenizer: Tokenizer, text: bytes) -> list[int]:
    """Returns the ids of a new document that begins with `text`.

    Raises:
      UsageError: bytes that the vocabulary cannot write, or no ids at all.
    """
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    ids = bos + tokenizer.encode(text).tolist()
    if not ids:
        raise UsageError("an empty prompt: no token stands ahead of this model's documents, so it needs some text")
    return ids


def _prompt_ids(tokenizer: Tokenizer, prompt: bytes, *, is_chat: bool) -> list[int]:
    try:
        if not is_chat:
            return prompt_ids(tokenizer, prompt)
        message = {"role": "user", "content": prompt.decode("utf-8", "surrogateescape")}
        ids = prompt_ids(tokenizer, tokenizer.render_chat([message]))
        return ids[1:] if ids[0] == ids[1] == tokenizer.bos else ids  # a template may write it, too
    except UsageError as error:
        raise UsageError(f"{'--chat' if is_chat else '--prompt'}: {error}") from error


def _room(config: RunConfig, num_prompt: int, length: int) -> int:
    """Returns the tokens to make room for; raises UsageError if the model was not made for as many."""
    limit, total = config.model.context_length, num_prompt + length
    if limit is not None and total > limit:
        raise UsageError(
            f"--length={length}: with the {num_prompt:,} tokens of the prompt these are {total:,}, and the "
            f"model's context_length is {limit:,}; set it to at most {max(limit - num_prompt, 0):,}, or shorten "
            "the prompt")
    return -(-total // ROOM) * ROOM


def _write(pieces: Iterator[list[bytes]], prompt: bytes, num_samples: int, seed: int) -> None:
    # Bytes as they are: a character may begin in the prompt and end in the continuation, or be invalid.
    out = sys.stdout.buffer
    if num_samples == 1:
        out.write(prompt)
        for (piece,) in pieces:
            out.write(piece)
            out.flush()
        out.write(b"\n")
    else:
        for number, text in enumerate(map(b"".join, zip(*pieces, strict=True))):
            out.write(b"--- seed %d\n" % (seed + number) + prompt + text + b"\n")
    out.flush()


def _check(arguments: argparse.Namespace) -> tuple[bytes, Sampling]:
    for name, least in (("length", 0), ("samples", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise UsageError(f"--{name} {getattr(arguments, name)} must be at least {least}")
    try:
        sampling = Sampling(temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
                            min_p=arguments.min_p)
    except ValueError as error:
        raise UsageError(f"--temperature, --top_k, --top_p, --min_p: {error}") from error
    if arguments.prompt_file is None:
        return os.fsencode(arguments.prompt), sampling
    if arguments.prompt:
        raise UsageError("--prompt and --prompt_file are two prompts; give only one")
    try:
        return arguments.prompt_file.read_bytes(), sampling
    except OSError as error:
        raise UsageError(f"--prompt_file={arguments.prompt_file}: {error.strerror}") from error


if __name__ == "__main__":
    run_command(main)
