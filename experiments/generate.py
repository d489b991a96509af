"""Continues a prompt, byte by byte.

  python -m experiments.generate --workdir=runs/quickstart --prompt "def " [--length=200] [--temperature=0.7]

Every byte recomputes the last window of text, as long as the windows of training.
"""
import argparse
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import RunConfig
from experiments.data import BOS
from experiments.errors import UsageError, run_command
from experiments.run import evaluation_config, open_run
from hnet import HNetLM


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.generate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a run that saved a checkpoint")
    parser.add_argument("--step", type=int, help="the checkpoint to use; the newest by default")
    parser.add_argument("--prompt", default="", help="text to continue; empty starts a new document")
    parser.add_argument("--length", type=int, default=200, help="bytes to add")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 = always the most probable byte")
    parser.add_argument("--seed", type=int, default=0)
    run = open_run(parser, argv)
    arguments, _ = parser.parse_known_args(argv)
    if arguments.length < 0 or not arguments.temperature >= 0:  # NaN is neither
        raise UsageError(
            f"--length {arguments.length} and --temperature {arguments.temperature} must not be negative")
    prompt = os.fsencode(arguments.prompt)
    # Bytes as they are: a character may begin in the prompt and end in the continuation, or be none at all.
    sys.stdout.buffer.write(prompt)
    for byte in generate(run.config, run.params, prompt, length=arguments.length,
                         temperature=arguments.temperature, seed=arguments.seed):
        sys.stdout.buffer.write(bytes([byte]))
        sys.stdout.buffer.flush()
    print()


def generate(
    config: RunConfig, params: Any, prompt: bytes, *, length: int, temperature: float, seed: int = 0
) -> Iterator[int]:
    """Yields `length` bytes sampled after `prompt`. Compiles once per model, whatever the prompt."""
    size = config.data.sequence_length
    sample = _make_sampler(HNetLM(evaluation_config(config.model)))
    text = [BOS, *prompt]
    for key in jax.random.split(jax.random.key(seed), length):
        window = text[-size:]
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(window)] = window
        byte = int(sample(params, tokens, len(window), jnp.float32(temperature), key))
        text.append(byte)
        yield byte


@functools.cache
def _make_sampler(model: HNetLM):
    @jax.jit
    def sample(params, tokens, count, temperature, key):
        segment_ids = (jnp.arange(tokens.shape[1])[None] < count).astype(jnp.int32)
        logits = model.apply({"params": params}, tokens, segment_ids).logits[0, count - 1, :256]
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits))

    return sample


if __name__ == "__main__":
    run_command(main)
