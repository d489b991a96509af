"""Costs of the ways to provide chunk slots: step time, FLOPs and memory of a train step's gradient.

  python -m experiments.benchmarks.capacity [--outdir=docs/benchmarks] [--repeats=5]

Boundaries are random: within a row every byte is one with the same probability, which varies between rows as it
does in text. All ways compute the same numbers, because none demotes a boundary. `full` has a slot for every byte;
`rows` fits the fullest row and `packed` the whole batch, both with 5 % to spare; `grow` starts from the mean of
the rows.
"""
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import commands
from experiments.analysis.flops import count_flops
from experiments.benchmarks.timing import interleaved_seconds, write_results
from experiments.errors import run_command
from hnet import (
    AttentionConfig,
    ChunkingConfig,
    HNetConfig,
    HNetLM,
    RecurrenceConfig,
    StackConfig,
    StageConfig,
    parameter_shapes,
)

ROWS, LENGTH = 16, 512  # bytes
RATES = (1 / 4, 1 / 6)  # boundaries per byte
ROW_SPREAD = 0.2        # standard deviation of a row's rate, relative to the mean
INNER = {
    "attention": StageConfig(encoder="T4", stack=StackConfig(
        width=128, attention=AttentionConfig(num_heads=4), feed_forward_width=256)),
    "mamba2": StageConfig(encoder="M4", stack=StackConfig(
        width=128, recurrence=RecurrenceConfig(state_size=32), feed_forward_width=256)),
}


def main(argv: list[str]) -> None:
    parser = commands.parser(__doc__, "benchmarks.capacity")
    parser.add_argument("--outdir", type=Path, default=Path("docs/benchmarks"), help="where the JSON goes")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each way")
    arguments = parser.parse_args(argv)
    rows = [row for inner in INNER for rate in RATES for row in measure(inner, rate, arguments.repeats)]
    write_results("capacity", rows, arguments.outdir)


def measure(inner: str, rate: float, repeats: int) -> list[dict[str, object]]:
    tokens, levels = draw(rate)
    counts = levels.sum(axis=1)
    mean, worst = counts.mean() / LENGTH, counts.max() / LENGTH
    ways = {
        "full": dict(capacity=1.0),
        "rows": dict(capacity=min(1.0, 1.05 * worst), overflow="error"),
        "packed": dict(capacity=min(1.0, 1.05 * mean), overflow="error", packed=True),
        "grow": dict(capacity=mean, overflow="grow", grow_to=(1.25 * worst, 1.0)),
    }
    params = jax.tree.map(
        lambda shape: 0.05 * np.random.default_rng(0).standard_normal(shape.shape, np.float32),
        parameter_shapes(model_config(inner)))
    compiled = {name: _gradient(model_config(inner, **fields)).lower(params, tokens, levels).compile()
                for name, fields in ways.items()}
    seconds = interleaved_seconds(
        {name: partial(function, params, tokens, levels) for name, function in compiled.items()}, repeats=repeats)
    rows = []
    for name, fields in ways.items():
        slots = _slots(fields, counts)
        rows.append({
            "inner": inner, "bytes_per_chunk": round(1 / rate, 2), "way": name, "slots_in_use": slots,
            "inner_gflops": _inner_flops(inner, slots, packed=name == "packed") / 1e9,
            "step_seconds": seconds[name], "over_full": seconds[name] / seconds["full"],
            "temporary_mib": compiled[name].memory_analysis().temp_size_in_bytes / 2**20,
        })
    return rows


def model_config(inner: str, **fields) -> HNetConfig:
    outer = StageConfig(
        encoder="m1", decoder="m1", chunking=ChunkingConfig(router="given", **fields),
        stack=StackConfig(width=64, recurrence=RecurrenceConfig(state_size=32, chunk_size=32)))
    return HNetConfig(stages=(outer, INNER[inner]))


def draw(rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Draws bytes, and boundaries at a rate per row around `rate`: both [ROWS, LENGTH] int32."""
    rng = np.random.default_rng(0)
    row_rates = np.clip(rate * (1 + ROW_SPREAD * rng.standard_normal((ROWS, 1))), 0.02, 0.9)
    levels = rng.random((ROWS, LENGTH)) < row_rates
    levels[:, 0] = True
    return rng.integers(0, 256, (ROWS, LENGTH), dtype=np.int32), levels.astype(np.int32)


def _gradient(config: HNetConfig):
    def loss(params, tokens, levels):
        return jnp.mean(HNetLM(config).apply({"params": params}, tokens, boundary_levels=levels).logits ** 2)

    return jax.jit(jax.grad(loss))


def _slots(fields: dict, counts: np.ndarray) -> int:
    """Counts the chunk slots that the batch runs on, empty ones included."""
    if fields.get("packed"):
        return math.ceil(fields["capacity"] * LENGTH * ROWS)
    sizes = [math.ceil(capacity * LENGTH) for capacity in (fields["capacity"], *fields.get("grow_to", ()))]
    return ROWS * next((size for size in sizes if size >= counts.max()), sizes[-1])


def _inner_flops(inner: str, slots: int, *, packed: bool) -> int:
    """Counts forward FLOPs of the inner stage on its slots; packed attention forms scores between rows too."""
    rows = 1 if packed else ROWS
    config = HNetConfig(stages=(INNER[inner],))
    model, tokens = HNetLM(config), jax.ShapeDtypeStruct((rows, slots // rows), jnp.int32)
    total = count_flops(lambda p, t: model.apply({"params": p}, t).logits, parameter_shapes(config), tokens)
    return total - 2 * rows * (slots // rows) * INNER[inner].stack.width * config.vocab_size  # without the head


if __name__ == "__main__":
    run_command(main)
