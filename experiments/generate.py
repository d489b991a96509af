"""Continues prompts, byte by byte: each is read once, and every byte after it costs one step.

  python -m experiments.generate --workdir=runs/quickstart --prompt "def " [--length=200] [--temperature=0.7]
  python -m experiments.generate --workdir=runs/quickstart --prompt_file=notes.txt --top_p=0.9 --samples=4

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
from experiments.errors import UsageError, run_command
from experiments.runs.saved_run import SavedRun
from hnet import BOS, HNetLM, Sampling
from hnet import generate as generate_tokens


def main(argv: list[str]) -> None:
    parser = commands.run_parser(__doc__, "generate", purpose="to use")
    parser.add_argument("--prompt", default="", help="text to continue; empty starts a new document")
    parser.add_argument("--prompt_file", type=Path, help="a file whose content is the prompt, of any length")
    parser.add_argument("--length", type=int, default=200, help="number of bytes to add")
    parser.add_argument("--temperature", type=float, default=0.7,
                        help="randomness of the draw; 0 always takes the most probable byte")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k most probable bytes; 0 = from all")
    parser.add_argument("--top_p", type=float, default=1.0,
                        help="draw from the fewest bytes whose probabilities add up to p")
    parser.add_argument("--min_p", type=float, default=0.0,
                        help="leave out bytes less probable than this fraction of the most probable byte")
    parser.add_argument("--samples", type=int, default=1, help="number of continuations, drawn in one batch")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the first sample; each further one has the next seed")
    with SavedRun.from_command_line(parser, argv) as saved:
        arguments = parser.parse_args(split_overrides(argv)[0])
        prompt, sampling = _check(arguments)
        params = saved.params()
    rows = generate_bytes(saved.config, params, [prompt] * arguments.samples, length=arguments.length,
                          sampling=sampling, seed=arguments.seed)
    # Bytes as they are: a character may begin in the prompt and end in the continuation, or be invalid.
    out = sys.stdout.buffer
    if arguments.samples == 1:
        out.write(prompt)
        for (byte,) in rows:
            out.write(bytes([byte]))
            out.flush()
        out.write(b"\n")
    else:
        for number, row in enumerate(zip(*rows, strict=True)):
            out.write(b"--- seed %d\n" % (arguments.seed + number) + prompt + bytes(row) + b"\n")
    out.flush()
    window, total = saved.config.data.sequence_length, 1 + len(prompt) + arguments.length
    if total > window:
        print(f"note: {total} bytes with the prompt; the model was trained on windows of {window}",
              file=sys.stderr)


def generate_bytes(
    config: RunConfig, params: Any, prompts: Sequence[bytes], *, length: int, sampling: Sampling, seed: int = 0
) -> Iterator[list[int]]:
    """Yields one byte per prompt, `length` times, with full chunk capacity whatever the run trains with."""
    model = HNetLM(config.model.at_full_capacity())
    tokens = [[BOS, *prompt] for prompt in prompts]
    seeds = range(seed, seed + len(prompts))
    for drawn in generate_tokens(model, params, tokens, num_tokens=length, sampling=sampling, seeds=seeds,
                                 num_allowed=256):
        yield drawn.tolist()


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
