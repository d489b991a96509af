"""Savings from batched decoding: seconds per step and bytes per second for 1 to 32 rows.

  python -m experiments.benchmarks.decoding [--outdir=docs/benchmarks] [--repeats=50]

Models with random weights read random bytes, so rows begin chunks at different steps, as in practice: the inner
stage runs in about every second step for one row, and in every step for many rows. `over_one_row` is the time of
a step relative to one row; if it were 32 for 32 rows, the batch would save nothing.
"""
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import commands
from experiments.benchmarks.timing import interleaved_seconds, write_results
from experiments.config import RunConfig
from experiments.config.files import load_config
from experiments.errors import run_command
from hnet import HNetConfig, HNetLM, init_decode_state, parameter_shapes, step

BATCHES = (1, 8, 32)
MAX_LENGTH, STEPS = 256, 32  # bytes a state can hold per row; steps in one timed call


def main(argv: list[str]) -> None:
    parser = commands.parser(__doc__, "benchmarks.decoding")
    parser.add_argument("--outdir", type=Path, default=Path("docs/benchmarks"), help="where the JSON goes")
    parser.add_argument("--repeats", type=int, default=20, help=f"timed calls of {STEPS} steps")
    arguments = parser.parse_args(argv)
    rows = []
    for name in ("quickstart", "hnet2_tiny_stdlib"):
        config = load_config(name, [], RunConfig).model.at_full_capacity()
        calls = {batch: _decode(config, batch) for batch in BATCHES}
        seconds = interleaved_seconds(calls, repeats=arguments.repeats)
        for batch in BATCHES:
            per_step = seconds[batch] / STEPS
            rows.append({
                "config": name, "rows": batch, "step_milliseconds": 1e3 * per_step,
                "over_one_row": seconds[batch] / seconds[BATCHES[0]], "bytes_per_second": batch / per_step})
    write_results("decoding", rows, arguments.outdir)


def _decode(config: HNetConfig, batch: int):
    """Returns a call that reads STEPS random bytes of `batch` rows, byte by byte, from an empty state."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: rng.standard_normal(shape.shape, np.float32) / max(shape.shape[-2:]) ** 0.5,
        parameter_shapes(config))
    model = HNetLM(config)

    @jax.jit
    def run(params, tokens, state):
        def one(state, token):
            logits, state = step(model, params, token, state)
            return state, jnp.argmax(logits, axis=-1)

        return jax.lax.scan(one, state, tokens)[1]

    tokens = rng.integers(0, 256, (STEPS, batch)).astype(np.int32)
    state = init_decode_state(config, batch, MAX_LENGTH)
    return lambda: run(params, tokens, state)


if __name__ == "__main__":
    run_command(main)
