"""Bits per byte on held-out text.

  python -m experiments.evaluate --workdir=runs/quickstart [--step=400] [--config.eval_bytes=1000000]
"""
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments import commands
from experiments.config import RunConfig
from experiments.data import Batch, Corpus, EvaluationSource, WindowSource
from experiments.errors import run_command
from experiments.runs.saved_run import open_run
from experiments.training.losses import apply_model, next_byte_nats, target_mask
from experiments.training.mesh import batch_sharding, put_batch, use_mesh
from hnet import HNetLM

Evaluate = Callable[[Any, Iterable[Batch]], dict[str, float]]


def main(argv: list[str]) -> None:
    parser = commands.run_parser(__doc__, "evaluate", purpose="to evaluate")
    run = open_run(parser, argv)
    source = held_out(run.config, run.corpus())
    with use_mesh(run.mesh):
        metrics = make_evaluate(run.config, run.mesh)(run.params, source)
    print(f"step {run.step}, {source.num_bytes:,} held-out bytes")
    for name, value in metrics.items():
        print(f"{name} {value:.4f}")


def held_out(config: RunConfig, corpus: Corpus) -> EvaluationSource:
    """A fixed choice of `config.eval_bytes` held-out bytes, spread over the documents."""
    data = config.data
    windows = WindowSource(corpus.split("held_out"), data.sequence_length, seed=0, loss_marker=data.loss_marker)
    return EvaluationSource(
        windows, data.batch_size, num_bytes=config.eval_bytes,
        process_index=jax.process_index(), process_count=jax.process_count())


def make_evaluate(config: RunConfig, mesh: Mesh) -> Evaluate:
    """Returns a function of (params, batches) that compiles at its first call, once.

    Chunk capacity is full here whatever the run trains with: no boundary is ever demoted.
    """
    model = HNetLM(config.model.at_full_capacity())

    def sums(params: Any, batch: Batch) -> dict[str, jax.Array]:
        output = apply_model(model, params, batch)
        counts = {
            "nats": next_byte_nats(output.logits, batch),
            "bytes": jnp.sum(target_mask(batch)),
        }
        for name, stage in output.stages.items():
            counts[f"{name}/tokens"] = jnp.sum(stage.is_real)
            counts[f"{name}/chunks"] = jnp.sum(stage.boundary_mask)
        return counts

    compiled = jax.jit(sums)

    def evaluate(params: Any, batches: Iterable[Batch]) -> dict[str, float]:
        sharding = batch_sharding(mesh)
        parts = [jax.device_get(compiled(params, put_batch(batch, sharding))) for batch in batches]
        total = {name: sum(float(part[name]) for part in parts) for name in parts[0]}
        metrics = {"eval/bits_per_byte": total["nats"] / total["bytes"] / math.log(2)}
        for index in range(len(config.model.stages) - 1):
            name = f"stage{index}"
            metrics[f"eval/{name}/boundary_rate"] = total[f"{name}/chunks"] / total[f"{name}/tokens"]
            metrics[f"eval/{name}/bytes_per_chunk"] = total["stage0/tokens"] / total[f"{name}/chunks"]
        return metrics

    return evaluate


if __name__ == "__main__":
    run_command(main)
