"""Bits per byte on held-out text, or on the text of any source.

  python -m experiments.evaluate --workdir=runs/quickstart [--step=400] [--config.eval_bytes=1000000]
  python -m experiments.evaluate --workdir=runs/smollm2 --source='files:docs/**/*.md'

A byte counts if the model predicted it, alone or within a token, so models of bytes and of tokens compare. The
first token of a document is not predicted where nothing stands before it.
"""
import collections
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import commands
from experiments.config import RunConfig
from experiments.config.command_line import split_overrides
from experiments.data import EvaluationSource, Tokenizer
from experiments.data.source_text import read_source
from experiments.errors import UsageError, run_command
from experiments.runs.progress import Progress
from experiments.runs.saved_run import SavedRun
from experiments.training.batches import all_batches, held_out_batches, in_tokens
from experiments.training.losses import Batch, apply_model, next_token_nats, read_bytes, target_bytes, target_mask
from experiments.training.mesh import batch_placer, make_mesh, use_mesh
from hnet import HNetLM


def main(argv: list[str]) -> None:
    parser = commands.run_parser(__doc__, "evaluate", purpose="to evaluate")
    parser.add_argument("--source", help="text to read in place of the held-out text, up to config.eval_bytes of "
                                         "it: files:GLOB, stdlib or tfds:NAME, of any number of documents")
    source_name = parser.parse_args(split_overrides(argv)[0]).source
    with SavedRun.from_command_line(parser, argv) as saved:
        tokenizer = saved.tokenizer()
        source, description = _open_text(saved, tokenizer, source_name)
        params = saved.params()
    mesh = make_mesh(1, jax.devices()[:1])
    with use_mesh(mesh), Progress(0, unit="batch", file=sys.stderr) as progress:
        evaluate = make_evaluate(
            saved.config, source, batch_placer(mesh), on_batch=progress.seldom)
        metrics = evaluate(params)
    print(f"step {saved.step}, {description}")
    for name, value in metrics.items():
        print(f"{name} {value:.4f}")


def _open_text(saved: SavedRun, tokenizer: Tokenizer, source: str | None) -> tuple[EvaluationSource, str]:
    """Returns the batches to read, and a description of their text."""
    config = saved.config
    if source is None:
        batches = held_out_batches(config, in_tokens(saved.corpus(), tokenizer), tokenizer)
        return batches, f"{batches.num_bytes:,} held-out bytes"
    try:
        text = read_source(source, tokenizer, num_bytes=config.eval_bytes, text_key=config.data.text_key)
        batches = all_batches(config, text.documents, tokenizer)
    except UsageError as error:
        raise UsageError(str(error).replace("--config.data.source", "--source").replace(
            "config.data.source", "--source")) from error
    read = f"{len(text.documents.names):,} of " if len(text.documents.names) < text.num_documents else ""
    lost = f", without {text.num_unwritable:,} bytes that no token stands for" if text.num_unwritable else ""
    documents = "document" if text.num_documents == 1 else "documents"
    return batches, f"{batches.num_bytes:,} bytes in {read}{text.num_documents:,} {documents} of {source}{lost}"


def make_evaluate(
    config: RunConfig, held_out: EvaluationSource, place: Callable[[Any], Batch],
    *, on_batch: Callable[[int, int], None] | None = None,
) -> Callable[[Any], dict[str, float]]:
    """Returns a function from parameters to metrics on `held_out` that compiles at its first call, once.

    `place` puts a batch on the devices. Chunk capacity is full here whatever the run trains with: no boundary is
    ever demoted.

    Args:
      on_batch: told after each batch how many are done, of how many.
    """
    model = HNetLM(config.model.at_full_capacity())

    def sums(params: Any, batch: Batch) -> dict[str, jax.Array]:
        output = apply_model(model, params, batch)
        counts = {
            "nats": next_token_nats(output.logits, batch),
            "targets": jnp.sum(target_mask(batch)),
            "bytes": target_bytes(batch),
            "read_bytes": read_bytes(batch),
        }
        for name, stage in output.stages.items():
            counts[f"{name}/tokens"] = jnp.sum(stage.is_real)
            counts[f"{name}/chunks"] = jnp.sum(stage.boundary_mask)
        return counts

    compiled = jax.jit(sums)

    def evaluate(params: Any) -> dict[str, float]:
        total: dict[str, float] = collections.Counter()
        for number, batch in enumerate(held_out, start=1):
            part = jax.device_get(compiled(params, place(batch)))
            total.update({name: float(value) for name, value in part.items()})
            if on_batch:
                on_batch(number, len(held_out))
        metrics = {"eval/bits_per_byte": total["nats"] / total["bytes"] / math.log(2)}
        if config.data.tokenizer:
            metrics["eval/nats_per_token"] = total["nats"] / total["targets"]
        for index in range(len(config.model.stages) - 1):
            name = f"stage{index}"
            metrics[f"eval/{name}/boundary_rate"] = total[f"{name}/chunks"] / total[f"{name}/tokens"]
            metrics[f"eval/{name}/bytes_per_chunk"] = total["read_bytes"] / total[f"{name}/chunks"]
        return metrics

    return evaluate


if __name__ == "__main__":
    run_command(main)
