"""Times block-sparse attention against dense attention, on whatever device is here.

  python -m experiments.benchmarks.attention --preset=quick|full [--outdir=docs/benchmarks] [--repeats=5]
  python -m experiments.benchmarks.attention --tune

Lists are random and not causal: each block of queries reads the same share of the blocks of keys, `density`. All
ways read the same lists and run in one process, in turns. `dense` is jax.nn.dot_product_attention over all keys
(cuDNN on a GPU), which is what one would run instead; `flex` is PyTorch's FlexAttention with the same block mask,
where a CUDA build of torch is installed. `tflops` counts what listed tiles need: 4 per pair and feature forward,
14 with the backward pass. `of_ceiling` divides by a large matmul, timed here. `of_ideal` is the speed-up over
dense times the density: 1 where work follows it. `lists` and `transpose` are what building the lists costs.

--tune times sizes of blocks at a density of 1/8 and writes the table of them.
"""
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import commands
from experiments.benchmarks.timing import interleaved_seconds, write_results
from experiments.errors import run_command
from experiments.pages.pictures import Row, Rows, picture
from layers import SAME_SEGMENT, BlockLists, attend

DENSITIES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
KERNELS = {"tpu": ["pallas_tpu"], "gpu": ["pallas_gpu"], "cpu": []}


class Size(NamedTuple):
    tokens: int
    width: int
    heads: int
    key_heads: int


PRESETS = {
    "quick": [Size(4096, 64, 8, 8)],
    "full": [Size(tokens, width, 32, 32 // groups)
             for tokens, width, groups in itertools.product((4096, 16384, 32768, 131072), (64, 128), (1, 4, 8))],
}
QUICK_DENSITIES = (1, 1 / 4, 1 / 8, 1 / 16)
BLOCK = {"cpu": 128, "gpu": 128, "tpu": 512}


def main(argv: list[str]) -> None:
    parser = commands.parser(__doc__, "benchmarks.attention")
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--outdir", type=Path, default=Path("docs/benchmarks"), help="where the results go")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each way")
    parser.add_argument("--tune", action="store_true", help="time sizes of blocks instead")
    arguments = parser.parse_args(argv)
    ceiling = matmul_ceiling()
    if arguments.tune:
        write_results("attention_tuning", tune(PRESETS[arguments.preset][0], arguments.repeats), arguments.outdir)
        return
    densities = QUICK_DENSITIES if arguments.preset == "quick" else DENSITIES
    rows = []
    for size in PRESETS[arguments.preset]:
        for backward in (False, True):
            rows += measure(size, densities, backward, ceiling, arguments.repeats)
            print(f"{size.tokens} tokens, width {size.width}, {size.heads} / {size.key_heads} heads, "
                  f"{'forward and backward' if backward else 'forward'}: done", flush=True)
    path = write_results("attention", rows, arguments.outdir)
    path.with_suffix(".svg").write_text(plot(rows))
    print(path.with_suffix(".svg"))


def measure(
    size: Size, densities: tuple[float, ...], backward: bool, ceiling: float, repeats: int
) -> list[dict[str, Any]]:
    """One row per density and way."""
    platform = jax.default_backend()
    block = BLOCK[platform]
    q, k, v = inputs(size)
    count = size.tokens // block
    scores = jnp.asarray(np.random.default_rng(0).random((1, size.key_heads, count, count)), jnp.float32)
    dense = functools.partial(
        jax.nn.dot_product_attention, implementation="cudnn" if platform == "gpu" else None)
    calls: dict[Any, Callable[[], Any]] = {(1, "dense"): functools.partial(_compiled(dense, backward), q, k, v)}
    for density in densities:
        build = jax.jit(functools.partial(
            BlockLists.from_top_k, k=round(density * count), block_q=block, block_k=block, causal=False))
        lists = build(scores)
        calls[density, "lists"] = functools.partial(build, scores)
        calls[density, "transpose"] = functools.partial(jax.jit(BlockLists.transpose), lists)
        for name in ["xla", *KERNELS[platform]]:
            calls[density, name] = functools.partial(
                _compiled(functools.partial(_sparse, name), backward), q, k, v, lists)
        if platform == "gpu":
            flex = flex_attention(size, lists, backward)
            if flex is None:
                print("flex is left out: no CUDA build of torch here", flush=True)
            else:
                calls[density, "flex"] = flex
    seconds = interleaved_seconds(calls, repeats=repeats)
    flops_per_pair = (14 if backward else 4) * size.width * size.heads
    rows = []
    for (density, way), taken in seconds.items():
        row = {"tokens": size.tokens, "width": size.width, "heads": size.heads, "key_heads": size.key_heads,
               "backward": backward, "density": density, "way": way, "milliseconds": 1e3 * taken}
        is_attention = way not in ("lists", "transpose")
        speed = density * size.tokens**2 * flops_per_pair / taken
        over_dense = seconds[1, "dense"] / taken
        figures = {"tflops": speed / 1e12, "of_ceiling": speed / ceiling, "over_dense": over_dense,
                   "of_ideal": over_dense * density}
        rows.append(row | (figures if is_attention else dict.fromkeys(figures, 0.0)))
    return rows


def tune(size: Size, repeats: int) -> list[dict[str, Any]]:
    """Seconds of each size of blocks, at a density of 1/8, relative to the best of each way and pass."""
    platform, density = jax.default_backend(), 1 / 8
    blocks = (64, 128, 256) if platform == "cpu" else (128, 256, 512, 1024) if platform == "tpu" else (64, 128)
    q, k, v = inputs(size)
    rows = []
    for backward in (False, True):
        calls = {}
        for (block_q, block_k), name in itertools.product(
                itertools.product(blocks, blocks), ["xla", *KERNELS[platform]]):
            scores = np.random.default_rng(0).random((1, 1, size.tokens // block_q, size.tokens // block_k))
            lists = BlockLists.from_top_k(jnp.asarray(scores, jnp.float32), round(density * scores.shape[-1]),
                                          block_q=block_q, block_k=block_k, causal=False)
            calls[name, block_q, block_k] = functools.partial(
                _compiled(functools.partial(_sparse, name), backward), q, k, v, lists)
        seconds = interleaved_seconds(calls, repeats=repeats)
        for (name, block_q, block_k), taken in seconds.items():
            best = min(other for key, other in seconds.items() if key[0] == name)
            rows.append({"way": name, "backward": backward, "tokens": size.tokens, "width": size.width,
                         "block_q": block_q, "block_k": block_k, "milliseconds": 1e3 * taken,
                         "over_best": taken / best})
    return rows


def inputs(size: Size) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v of one row; float32 on a CPU, else bfloat16."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((1, size.tokens, heads, size.width), np.float32), dtype)
                 for heads in (size.heads, size.key_heads, size.key_heads))


def matmul_ceiling() -> float:
    """FLOP per second of a large matmul in the dtype of `inputs`."""
    width, dtype = (2048, jnp.float32) if jax.default_backend() == "cpu" else (8192, jnp.bfloat16)
    x = jnp.ones((width, width), dtype)
    seconds = interleaved_seconds({"matmul": functools.partial(jax.jit(jnp.matmul), x, x)}, repeats=10)
    return 2 * width**3 / seconds["matmul"]


def flex_attention(size: Size, lists: BlockLists, backward: bool) -> Callable[[], Any] | None:
    """FlexAttention of PyTorch on the same lists; None without a CUDA build of torch."""
    try:
        import torch
        from torch.nn.attention.flex_attention import BlockMask, flex_attention
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    counts, ids = (torch.tensor(np.asarray(x), device="cuda") for x in (lists.counts, lists.ids))
    no_partial = torch.zeros_like(counts)
    block_mask = BlockMask.from_kv_blocks(
        no_partial, ids, counts, ids, BLOCK_SIZE=(lists.block_q, lists.block_k),
        seq_lengths=(size.tokens, size.tokens))
    q, k, v = (torch.randn(1, heads, size.tokens, size.width, device="cuda", dtype=torch.bfloat16,
                           requires_grad=backward) for heads in (size.heads, size.key_heads, size.key_heads))
    compiled = torch.compile(flex_attention)

    def run():
        o = compiled(q, k, v, block_mask=block_mask, enable_gqa=size.heads != size.key_heads)
        if backward:
            torch.autograd.grad(o.sum(), (q, k, v))
        torch.cuda.synchronize()

    return run


def plot(rows: list[dict[str, Any]]) -> str:
    """Draws the speed of each implementation relative to dense attention, by density."""
    lines = []
    attention = [row for row in rows if row["over_dense"] and row["way"] != "dense"]
    ways = list(dict.fromkeys(row["way"] for row in attention))
    for backward, density in itertools.product((False, True), sorted({row["density"] for row in attention})):
        for way in ways:
            these = [row for row in attention
                     if (row["way"], row["density"], row["backward"]) == (way, density, backward)]
            speed_ups = np.array([row["over_dense"] for row in these])
            label = (f"{way}, density 1/{1 / density:g}{', with backward' if backward else ''}: "
                     f"{speed_ups.mean():.3g}")
            lines.append(Row(label, ways.index(way), speed_ups))
    return picture([Rows("times as fast as dense attention; one dot per size", lines)])


def _sparse(implementation: str, q, k, v, lists):
    return attend(q, k, v, mask=SAME_SEGMENT, blocks=lists, implementation=implementation).o


def _compiled(attention: Callable, backward: bool) -> Callable:
    if not backward:
        return jax.jit(attention)

    def loss(q, k, v, *lists):
        return jnp.sum(attention(q, k, v, *lists).astype(jnp.float32))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


if __name__ == "__main__":
    run_command(main)
