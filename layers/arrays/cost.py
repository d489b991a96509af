"""Costs of programs whose loops and kernels a counter of floating-point operations cannot see into."""
import functools
import re
from collections.abc import Callable, Hashable

import jax


@functools.cache
def with_flops(name: str, flops: int, function: Callable, *settings: Hashable) -> Callable:
    """Returns function(*settings, ...) as a compiled call whose name states its cost, which `stated_flops` reads.

    Args:
      flops: matmuls count 2 per multiply-add; an upper bound, where work depends on values.
    """
    def call(*arguments):
        return function(*settings, *arguments)

    call.__name__ = call.__qualname__ = f"{name}_of_{flops}_flops"
    return jax.jit(call)


def stated_flops(name: str) -> int | None:
    """Reads the cost from the name of a compiled call; None if it states none."""
    found = re.fullmatch(r"\w+_of_(\d+)_flops", name)
    return int(found.group(1)) if found else None
