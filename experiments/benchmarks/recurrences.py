"""Times recurrences with a gradient: the chunkwise form against the scan over tokens of the equation.

  python -m experiments.benchmarks.recurrences [--outdir=docs/benchmarks] [--repeats=5]

2 rows of 2048 tokens, 4 heads with states of 64 x 64; and a diagonal state of 512 channels in 4 rows of 4096
tokens, for which the alternative is jax.lax.associative_scan. `over_reference` is the time over that of the scan
in the same pass: below 1 is faster. `temporary_mib` is the memory XLA allocates besides inputs and outputs.

On a GPU or TPU it also times the kernels; and, for diagonal states in 8 rows of 4096 tokens with 2048 channels, it
gives GB/s of the bytes that must be moved, and the time over that of a pass which only adds and moves as many.
"""
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import commands
from experiments.benchmarks.timing import interleaved_seconds, write_results
from experiments.errors import run_command
from layers import diagonal_recurrence, dplr_recurrence, gated_delta_rule, gated_linear_attention

ROWS, TOKENS, HEADS, WIDTH = 2, 2048, 4, 64
DIAGONAL_SHAPE = (4, 4096, 512)
MEMORY_SHAPE = (8, 4096, 2048)


def main(argv: list[str]) -> None:
    parser = commands.parser(__doc__, "benchmarks.recurrences")
    parser.add_argument("--outdir", type=Path, default=Path("docs/benchmarks"), help="where the JSON goes")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each way")
    arguments = parser.parse_args(argv)
    rows = []
    for name, (recur, inputs, implementations) in recurrences().items():
        for backward in (False, True):
            rows += measure(name, recur, inputs, implementations, backward, arguments.repeats)
    write_results("recurrences", rows, arguments.outdir)
    if _kernels():
        ways = ("reference", "associative", *_kernels())
        rows = [row for dtype in ("float32", "bfloat16")
                for row in diagonal_bandwidth(ways, MEMORY_SHAPE, dtype, arguments.repeats)]
        write_results("diagonal_bandwidth", rows, arguments.outdir)


def recurrences() -> dict[str, tuple[Callable, tuple[jax.Array, ...], tuple[str, ...]]]:
    """Returns per op a function of an implementation and inputs, those inputs, and its implementations."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    def l2_normalize(x: jax.Array) -> jax.Array:
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    shape = (ROWS, TOKENS, HEADS)
    q, k, v = normal(*shape, WIDTH), l2_normalize(normal(*shape, WIDTH)), normal(*shape, WIDTH)
    beta, head_decay = jax.nn.sigmoid(normal(*shape)), jax.nn.log_sigmoid(normal(*shape) + 2)
    channel_decay = jax.nn.log_sigmoid(normal(*shape, WIDTH) + 2)
    ways = ("reference", "chunkwise", *_kernels())

    def attention(implementation, q, k, v, decay):
        return gated_linear_attention(q, k, v, decay, implementation=implementation)[0]

    def delta(implementation, q, k, v, beta, decay):
        return gated_delta_rule(q, k, v, beta, decay, implementation=implementation)[0]

    def rwkv7(implementation, r, w, k, v, a, b):
        return dplr_recurrence(r, w, k, v, a, b, implementation=implementation)[0]

    def diagonal(implementation, x, log_a):
        return diagonal_recurrence(x, log_a=log_a, implementation=implementation)[0]

    return {
        "ssd": (attention, (q, k, v, head_decay), ways),
        "gla": (attention, (q, k, v, channel_decay), ways),
        "gated_delta_rule": (delta, (q, k, v, beta, head_decay), ways),
        "kda": (delta, (q, k, v, beta, channel_decay), ways),
        "rwkv7": (rwkv7, (q, channel_decay, k, v, -k, k * beta[..., None]), ways),
        "diagonal": (diagonal, (normal(*DIAGONAL_SHAPE), jax.nn.log_sigmoid(normal(*DIAGONAL_SHAPE) + 2)),
                     ("reference", "associative")),
    }


def _kernels() -> tuple[str, ...]:
    """Names the kernels that this platform has."""
    return {"tpu": ("pallas_tpu",), "gpu": ("pallas_gpu",)}.get(jax.devices()[0].platform, ())


def measure(
    name: str, recur: Callable, inputs: tuple[jax.Array, ...], implementations: tuple[str, ...], backward: bool,
    repeats: int,
) -> list[dict[str, Any]]:
    compiled, compile_seconds = {}, {}
    for implementation in implementations:
        run = functools.partial(recur, implementation)
        if backward:
            run = jax.grad(lambda *x, run=run: jnp.sum(run(*x) ** 2), argnums=tuple(range(len(inputs))))
        start = time.perf_counter()
        compiled[implementation] = jax.jit(run).lower(*inputs).compile()
        compile_seconds[implementation] = time.perf_counter() - start
    seconds = interleaved_seconds(
        {each: functools.partial(function, *inputs) for each, function in compiled.items()}, repeats=repeats)
    return [{
        "recurrence": name, "backward": backward, "implementation": each, "milliseconds": 1e3 * taken,
        "over_reference": taken / seconds["reference"], "compile_seconds": compile_seconds[each],
        "temporary_mib": compiled[each].memory_analysis().temp_size_in_bytes / 2**20,
    } for each, taken in seconds.items()]


def diagonal_bandwidth(
    implementations: tuple[str, ...], shape: tuple[int, int, int], dtype: str, repeats: int
) -> list[dict[str, Any]]:
    """Times the diagonal recurrence, alone and with its gradient, next to passes that move the same bytes."""
    rng = np.random.default_rng(0)
    x, log_a, dy, y = (jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype) for _ in range(4))
    inputs = x, -jnp.abs(log_a), dy, y

    def forward(implementation, x, log_a, *_):
        return diagonal_recurrence(x, log_a=log_a, implementation=implementation)[0]

    def with_gradient(implementation, x, log_a, dy, *_):
        y, pull_back = jax.vjp(functools.partial(forward, implementation), x, log_a)
        return y, pull_back(dy)

    def add(x, log_a, *_):
        return x + log_a

    def add_to_each(*arrays):
        return [array + 1 for array in arrays]

    rows = []
    # Arrays read and written: x, log_a and y; and for the gradient log_a, y, dy and two results.
    for run, same_bytes, num_arrays in ((forward, add, 3), (with_gradient, add_to_each, 8)):
        functions = {"copy": jax.jit(same_bytes)} | {
            each: jax.jit(functools.partial(run, each)) for each in implementations}
        seconds = interleaved_seconds(
            {each: functools.partial(function, *inputs) for each, function in functions.items()},
            repeats=repeats)
        rows += [{
            "dtype": dtype, "backward": run is with_gradient, "implementation": each, "milliseconds": 1e3 * taken,
            "gb_per_second": num_arrays * x.nbytes / taken / 1e9, "over_copy": taken / seconds["copy"],
        } for each, taken in seconds.items()]
    return rows


if __name__ == "__main__":
    run_command(main)
