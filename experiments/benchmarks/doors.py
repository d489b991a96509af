"""Counts doors: the project's Python frames between Mamba2.__call__ and the first matmul of its scan.

  python -m experiments.benchmarks.doors

One row per implementation, forward and with its gradient: the number of frames, and their functions from the
outermost to the one that multiplies. "auto" is the default of models; its program holds a kernel per platform, of
which the first to be traced counts.
"""
import argparse
import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.extend.core.primitives import dot_general_p

import layers
from experiments.errors import run_command
from layers import Mamba2
from layers.nn.linear import Linear

IMPLEMENTATIONS = ("auto", "reference", "chunkwise", "pallas_tpu", "pallas_gpu")
LAYERS = str(Path(layers.__file__).parent)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.doors", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    for implementation in IMPLEMENTATIONS:
        for with_gradient in (False, True):
            frames = frames_to_the_scan(implementation, with_gradient)
            name = f"{implementation}{' with gradient' if with_gradient else ''}"
            print(f"{name:24s} {len(frames):2d}  {' > '.join(frames)}")


def frames_to_the_scan(implementation: str, with_gradient: bool) -> list[str]:
    """Returns the functions called between Mamba2.__call__ and the first matmul below it outside projections."""
    module = Mamba2(state_size=16, head_width=16, implementation=implementation)
    x = jax.ShapeDtypeStruct((1, 32, 32), jnp.float32)
    params = jax.eval_shape(Mamba2(state_size=16, head_width=16).init, jax.random.key(0), x)

    def loss(params, x):
        return jnp.sum(module.apply(params, x)[0])

    jax.clear_caches()  # a function that was traced before is not called again
    with _recorded_stacks() as stacks:
        jax.eval_shape(jax.grad(loss) if with_gradient else loss, params, x)
    layer, projection = Mamba2.__call__.__qualname__, Linear.__call__.__qualname__
    stack = next(stack for stack in stacks if layer in stack and projection not in stack)
    return stack[stack.index(layer) + 1:]


@contextlib.contextmanager
def _recorded_stacks() -> Iterator[list[list[str]]]:
    """Records at every matmul the functions of `layers` on the stack, the outermost first."""
    stacks, bind = [], dot_general_p.bind

    def record(*arguments, **parameters):
        frames = [frame for frame, _ in traceback.walk_stack(None)
                  if frame.f_code.co_filename.startswith(LAYERS)]
        stacks.append([frame.f_code.co_qualname for frame in reversed(frames)])
        return bind(*arguments, **parameters)

    dot_general_p.bind = record
    try:
        yield stacks
    finally:
        del dot_general_p.bind


if __name__ == "__main__":
    run_command(main)
