"""Checks on this machine's device that every fast implementation computes what its reference computes.

  python -m experiments.selfcheck

For each op, implementation and dtype: the error of values and gradients, root mean square over that of the exact
result, which the float32 reference gives for the same, rounded inputs. Exits with 1 if one is above its limit.
"""
import functools
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import commands
from experiments.errors import run_command
from experiments.pages.tables import aligned
from layers import (
    CAUSAL,
    SAME_SEGMENT,
    BlockLists,
    Window,
    attend,
    diagonal_recurrence,
    dplr_recurrence,
    gated_delta_rule,
    gated_linear_attention,
    log_linear_attention,
    smooth,
    ssd_scan,
    token_info,
)

LIMITS = {"float32": 2e-6, "bfloat16": 5e-3}  # a rounding to bfloat16 costs about 1.6e-3, and gradients take a few


class Check(NamedTuple):
    """An op with its inputs: `run(implementation, *inputs)` returns an array, with gradients in all inputs."""

    op: str
    case: str
    run: Callable[..., jax.Array]
    inputs: tuple[jax.Array, ...]
    implementations: tuple[str, ...]


def main(argv: list[str]) -> None:
    commands.parser(__doc__, "selfcheck").parse_args(argv)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}; each line takes a few seconds", flush=True)
    rows = [("op", "case", "implementation", "dtype", "values", "gradients", "")]
    failed = False
    for check in checks(device.platform):
        for dtype in LIMITS:
            for implementation, errors in errors_of(check, dtype):
                name = check.op, check.case, implementation, dtype
                if isinstance(errors, str):
                    rows.append((*name, "", "", f"not run: {errors}"))
                    continue
                is_good = all(error <= LIMITS[dtype] for error in errors)
                failed |= not is_good
                rows.append((*name, *(f"{error:.1e}" for error in errors),
                             "ok" if is_good else f"ABOVE {LIMITS[dtype]:.0e}"))
                print(".", end="", flush=True)
    print("\n" + "\n".join(aligned(rows, left=(0, 1, 2, 3, 6))))
    if failed:
        sys.exit("an implementation differs from its reference: please report this table")


def checks(platform: str) -> Iterator[Check]:
    """Yields the checks for a platform; kernels are checked only where they run natively."""
    kernels = {"tpu": ("pallas_tpu",), "gpu": ("pallas_gpu",)}.get(platform, ())
    draw = np.random.default_rng(0)
    yield from _attention_checks(draw, ("xla", *kernels, "auto"))
    yield from _matrix_state_checks(draw, ("chunkwise", *kernels, "auto"))
    yield from _vector_state_checks(draw, ("associative", *kernels, "auto"))


def _normal(draw: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(draw.standard_normal(shape, np.float32))


def _hostile_gates(draw: np.random.Generator, *shape: int) -> jax.Array:
    """Draws logs of decays of which a tenth are shut, and as many wide open."""
    gates, shares = [-60.0, -1e-7, -0.1, -1.0, -3.0], [0.1, 0.1, 0.3, 0.3, 0.2]
    return jnp.asarray(draw.choice(gates, shape, p=shares), jnp.float32)


def _attention_checks(draw: np.random.Generator, implementations: tuple[str, ...]) -> Iterator[Check]:
    normal = functools.partial(_normal, draw)
    documents = jnp.asarray(np.sort(draw.integers(0, 4, (2, 700))), jnp.int32)
    mask = CAUSAL & SAME_SEGMENT
    for case, heads, key_heads, width, options in (
            ("causal", 4, 4, 128, dict(mask=mask)),
            ("window, softcap, shared keys", 8, 2, 64, dict(mask=mask & Window(200), softcap=20.0)),
            ("segments", 4, 1, 128, dict(mask=mask, q_tokens=token_info(700, segment_ids=documents)))):
        chosen = jnp.asarray(draw.random((2, key_heads, 6, 6)) < 0.6)
        lists = BlockLists.from_block_mask(chosen, block_q=128, block_k=128)

        def run(implementation, q, k, v, lists=lists, options=options):
            return attend(q, k, v, blocks=lists, implementation=implementation, **options).o

        yield Check("block_sparse_attention", case, run, (
            normal(2, 700, heads, width), normal(2, 700, key_heads, width), normal(2, 700, key_heads, width)),
            implementations)


def _matrix_state_checks(draw: np.random.Generator, implementations: tuple[str, ...]) -> Iterator[Check]:
    normal = functools.partial(_normal, draw)
    log_decay = -jnp.abs(normal(2, 300, 4))

    def scan(implementation, x, b, c):
        return ssd_scan(x, log_decay, b, c, implementation=implementation)[0]

    inputs = normal(2, 300, 4, 32), normal(2, 300, 1, 16), normal(2, 300, 1, 16)
    yield Check("ssd_scan", "300 tokens", scan, inputs, implementations)
    keys = normal(2, 200, 4, 32)
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    hostile = _hostile_gates(draw, 2, 200, 4, 32)

    def attention_per_channel(implementation, q, k, v):
        return gated_linear_attention(q, k, v, hostile, implementation=implementation)[0]

    def delta_per_head(implementation, q, k, v):
        return gated_delta_rule(q, k, v, None, hostile[..., 0], implementation=implementation)[0]

    inputs = normal(2, 200, 4, 32), keys, normal(2, 200, 4, 16)
    yield Check("gated_linear_attention", "hostile gates", attention_per_channel, inputs, implementations)
    yield Check("gated_delta_rule", "hostile gates", delta_per_head, inputs, implementations)

    def delta_per_channel(implementation, q, k, v):
        return gated_delta_rule(q, k, v, None, hostile, implementation=implementation)[0]

    def low_rank(implementation, r, k, v):
        return dplr_recurrence(r, hostile, k, v, -k, 0.5 * k, implementation=implementation)[0]

    def log_linear(implementation, q, k, v):
        scales = jnp.cos(jnp.arange(2 * 200 * 4 * 9, dtype=jnp.float32)).reshape(2, 200, 4, 9)
        return log_linear_attention(q, k, v, hostile[..., 0], scales, implementation=implementation)

    yield Check("gated_delta_rule", "hostile gates, per channel", delta_per_channel, inputs, implementations)
    yield Check("dplr_recurrence", "hostile gates", low_rank, inputs, implementations)
    yield Check("log_linear_attention", "hostile gates", log_linear, inputs, ("ladder",))


def _vector_state_checks(draw: np.random.Generator, implementations: tuple[str, ...]) -> Iterator[Check]:
    normal = functools.partial(_normal, draw)
    hostile = _hostile_gates(draw, 2, 200, 32)

    def diagonal(implementation, x):
        return diagonal_recurrence(x, log_a=hostile, implementation=implementation)[0]

    yield Check("diagonal_recurrence", "hostile gates", diagonal, (normal(2, 200, 32),), implementations)
    open_gates = -jnp.abs(normal(2, 1500, 200))

    def diagonal_of_documents(implementation, x, log_a):
        ids = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 4, (2, 1500))), jnp.int32)
        return diagonal_recurrence(x, log_a=log_a, segment_ids=ids, reverse=True, implementation=implementation)[0]

    def diagonal_of_complex(implementation, x, angle):
        a, x = 0.99 * jnp.exp(1j * angle.astype(jnp.float32)), x.astype(jnp.float32) * (1 + 1j)
        return jnp.real(diagonal_recurrence(x, a=a, implementation=implementation)[0])

    for case, run in (("documents, reversed", diagonal_of_documents), ("complex", diagonal_of_complex)):
        yield Check("diagonal_recurrence", case, run, (normal(2, 1500, 200), open_gates), implementations)
    probability = jnp.asarray(draw.uniform(0.05, 0.95, (2, 300)), jnp.float32)
    restarts = jnp.arange(300)[None] % 70 == jnp.array([[0], [5]])

    def average(implementation, x):
        return smooth(x, probability, restarts, implementation=implementation)

    yield Check("smooth", "300 chunks", average, (normal(2, 300, 64),), ("associative",))


def errors_of(check: Check, dtype: str) -> Iterator[tuple[str, tuple[float, float] | str]]:
    """Yields, per implementation, relative RMS errors of values and of gradients, or why it cannot run."""
    rounded = [x.astype(dtype) for x in check.inputs]
    exact = [x.astype(jnp.float32) for x in rounded]

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(implementation, *inputs):
        value, pull_back = jax.vjp(functools.partial(check.run, implementation), *inputs)
        cotangent = jnp.cos(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape)
        return value, pull_back(cotangent.astype(dtype).astype(value.dtype))

    expected, expected_gradients = values_and_gradients("reference", *exact)
    for implementation in check.implementations:
        try:
            value, gradients = values_and_gradients(implementation, *rounded)
        except NotImplementedError as reason:
            yield implementation, str(reason)
            continue
        yield implementation, (_error(value, expected),
                               max(map(_error, gradients, expected_gradients)))


def _error(actual: jax.Array, expected: jax.Array) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    return float(error) if np.isfinite(error) else float("inf")


if __name__ == "__main__":
    run_command(main)
