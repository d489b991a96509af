"""Runs an op on the cases of a file of vectors and compares all that is there: outputs, states, gradients."""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.assertions import GOLDEN_LIMIT, assert_golden, golden


def golden_cases(name: str) -> list[str]:
    """Returns the names of the cases in a file."""
    return sorted({key.split(".")[0] for key in golden(name) if "." in key})


def golden_case(name: str, case: str) -> dict[str, np.ndarray]:
    """Returns the arrays of one case, under their names in it."""
    return {key.removeprefix(f"{case}."): z for key, z in golden(name).items() if key.startswith(f"{case}.")}


def assert_golden_case(
    run: Callable, data: dict[str, np.ndarray], inputs: str, outputs: str = "o", *, limit: float = GOLDEN_LIMIT,
) -> None:
    """Calls run({name: float32 input}) -> outputs; reshapes states to those of the vectors.

    Args:
      inputs: names of what to differentiate by; those that the case lacks are left out.
      outputs: names in the order in which `run` returns them, each with its cotangent under d<name>.
    """
    x = {name: jnp.asarray(data[name], jnp.float32) for name in inputs.split() if name in data}
    expected = {name: data[name] for name in outputs.split() if name in data}
    cotangents = {name: jnp.asarray(data[f"d{name}"], jnp.float32) for name in expected}

    @jax.jit
    def values_and_gradients(x, cotangents):
        def named(x):
            values = dict(zip(outputs.split(), run(x), strict=True))
            return {name: values[name].reshape(expected[name].shape) for name in expected}

        values, pull_back = jax.vjp(named, x)
        return values, pull_back(cotangents)[0]

    values, gradients = values_and_gradients(x, cotangents)
    assert_golden(values, expected, limit=limit)
    assert_golden(gradients, {name: data[f"grad_{name}"] for name in x}, limit=limit)
