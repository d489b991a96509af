"""Floating-point operations, counted on the traced program: nothing is run and no weight is allocated.

Only matmuls and convolutions count, at 2 per multiply-add, as they are computed: attention forms all its scores,
those that the mask throws away too. A scan counts its body as often as it runs; the costliest branch of a cond
counts, so a stage that may grow is counted at its largest capacity. Block-sparse attention, whose loops follow
lists that only the run knows, states its own cost (`layers.arrays.cost`): that of all tiles its lists can hold.
"""
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from hnet import HNetConfig, HNetLM, parameter_shapes
from layers.arrays.cost import stated_flops


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Counts the FLOPs of one call.

    Args:
      arguments: pytrees of arrays or ShapeDtypeStructs.
    Raises:
      ValueError: the program has a loop whose length is not known beforehand.
    """
    return _count_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


@cache
def model_flops_per_byte(
    config: HNetConfig, sequence_length: int, tokens_per_chunk: tuple[float, ...]
) -> float:
    """Counts forward FLOPs per byte of a row of `sequence_length` bytes.

    Args:
      tokens_per_chunk: how many of its own tokens a chunk of each chunking stage holds, outermost first, as
        realised. Training takes three times as much, and more where activations are computed again.
    Raises:
      ValueError: not one number per chunking stage, or one below 1.
    """
    num_chunking = len(config.stages) - 1
    if len(tokens_per_chunk) != num_chunking or any(number < 1 for number in tokens_per_chunk):
        raise ValueError(f"tokens_per_chunk {tokens_per_chunk} must be {num_chunking} numbers of at least 1")
    # As many slots as there are chunks, to the nearest slot; no way to grow and no packing.
    capacities = [1 / number for number in tokens_per_chunk] + [1.0]
    stages = tuple(
        stage.with_chunking(capacity=capacity, overflow="merge", packed=False).with_stack(remat="none")
        for stage, capacity in zip(config.stages, capacities, strict=True))
    model = HNetLM(dataclasses.replace(config, stages=stages))

    def forward(params, tokens, levels):
        return model.apply({"params": params}, tokens, boundary_levels=levels).logits

    tokens = jax.ShapeDtypeStruct((1, sequence_length), jnp.int32)
    return count_flops(forward, parameter_shapes(config), tokens, tokens) / sequence_length


def _count_jaxpr(jaxpr: Any) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    stated = stated_flops(str(params.get("name", "")))
    if stated is not None:
        return stated
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * _size(equation.outvars[0]) * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs_axis = params["dimension_numbers"].rhs_spec[0]
        return 2 * _size(equation.outvars[0]) * math.prod(kernel) // kernel[outputs_axis]
    if name == "while":
        inside = sum(map(_count_jaxpr, _inner_jaxprs([params["body_jaxpr"]])))
        if inside:
            raise ValueError("the program has matmuls in a loop whose length is not known beforehand")
        return 0
    if name == "cond":
        return max(sum(map(_count_jaxpr, _inner_jaxprs([branch]))) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    return times * sum(map(_count_jaxpr, _inner_jaxprs(params.values())))


def _inner_jaxprs(values: Sequence[Any]) -> list[Any]:
    """Finds the jaxprs among an equation's parameters, open or closed, alone or in a tuple."""
    found = []
    for value in values:
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                found.append(each)
    return found


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)
