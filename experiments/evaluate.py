"""Bits per byte on held-out text.

  python -m experiments.evaluate --workdir=runs/quickstart [--step=400] [--config.eval_bytes=1000000]
"""
import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import commands
from experiments.config import RunConfig
from experiments.data import EvaluationSource
from experiments.errors import run_command
from experiments.runs.saved_run import SavedRun
from experiments.training.batches import held_out_batches, in_tokens
from experiments.training.losses import Batch, apply_model, next_byte_nats, read_bytes, target_bytes, target_mask
from experiments.training.mesh import batch_placer, make_mesh, use_mesh
from hnet import HNetLM


def main(argv: list[str]) -> None:
    parser = commands.run_parser(__doc__, "evaluate", purpose="to evaluate")
    with SavedRun.from_command_line(parser, argv) as saved:
        params, tokenizer = saved.params(), saved.tokenizer()
        source = held_out_batches(saved.config, in_tokens(saved.corpus(), tokenizer), tokenizer)
    mesh = make_mesh(1, jax.devices()[:1])
    with use_mesh(mesh):
        metrics = make_evaluate(saved.config, source, batch_placer(mesh))(params)
    print(f"step {saved.step}, {source.num_bytes:,} held-out bytes")
    for name, value in metrics.items():
        print(f"{name} {value:.4f}")


def make_evaluate(
    config: RunConfig, held_out: EvaluationSource, place: Callable[[Any], Batch],
    *, on_batch: Callable[[int], None] | None = None,
) -> Callable[[Any], dict[str, float]]:
    """Returns a function from parameters to metrics on `held_out` that compiles at its first call, once.

    `place` puts a batch on the devices. Chunk capacity is full here whatever the run trains with: no boundary is
    ever demoted.

    Args:
      on_batch: told after each batch how many are done.
    """
    model = HNetLM(config.model.at_full_capacity())

    def sums(params: Any, batch: Batch) -> dict[str, jax.Array]:
        output = apply_model(model, params, batch)
        counts = {
            "nats": next_byte_nats(output.logits, batch),
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
                on_batch(number)
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
