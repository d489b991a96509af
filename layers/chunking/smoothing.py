"""A moving average whose weights are confidences: H-Net's smoothing (arXiv 2507.07955, eq. 5)."""
from typing import Literal

import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, typed

# The release clamps the smoothing weight to [1e-4, 1 - 1e-4], so even a first chunk counts 0.9999.
MIN_SMOOTHING = 1e-4

SmoothingImplementation = Literal["auto", "reference", "associative"]


@typed
def smooth(
    z: Float[Array, "b c d"],
    p: Float[Array, "b c"],
    restarts: Bool[Array, "b c"],
    *,
    is_real: Bool[Array, "b c"] | None = None,
    initial_value: Float[Array, "b d"] | None = None,
    round_to_bfloat16: bool = False,
    implementation: SmoothingImplementation = "auto",
) -> Float[Array, "b c d"]:
    """Runs s_c = p_c z_c + (1 - p_c) s_{c-1} in float32; s_{c-1} counts as 0 where `restarts`.

    Args:
      is_real: False leaves s as it is; None: all are real.
      initial_value: s before the first chunk; None means zeros.
      round_to_bfloat16: run it as the release does, on bfloat16 inputs of Mamba-2's scan: with
        dt = -log(1 - p) it writes dt p (z / dt) and decays by exp(-dt), where dt, p and z / dt are rounded.
      implementation: "reference" steps chunk by chunk, "associative" is a parallel scan; "auto" means
        "associative".
    """
    p = jnp.where(p < MIN_SMOOTHING, MIN_SMOOTHING, jnp.where(p > 1 - MIN_SMOOTHING, 1 - MIN_SMOOTHING, p))
    z = z.astype(jnp.float32)
    keep, write = 1 - p, p[:, :, None] * z
    if round_to_bfloat16:
        keep, write = _as_rounded_scan(z, p)
    keep = jnp.where(restarts, 0.0, keep)
    if is_real is not None:
        keep, write = jnp.where(is_real, keep, 1.0), jnp.where(is_real[:, :, None], write, 0.0)
    keep = keep[:, :, None]
    if initial_value is not None:
        write = write.at[:, 0].add(keep[:, 0] * initial_value)
    if implementation == "reference":
        return _scan_reference(keep, write)
    return jax.lax.associative_scan(_compose, (jnp.broadcast_to(keep, write.shape), write), axis=1)[1]


def _as_rounded_scan(z: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    def rounded(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    dt = -jnp.log1p(-p)
    dt_rounded, p_rounded = rounded(dt), rounded(p)
    return jnp.exp(-dt_rounded), (dt_rounded * p_rounded)[:, :, None] * rounded(z / dt[:, :, None])


def _scan_reference(keep: jax.Array, write: jax.Array) -> jax.Array:
    def step(s, inputs):
        keep_c, write_c = inputs
        s = keep_c * s + write_c
        return s, s

    by_chunk = jnp.swapaxes(keep, 0, 1), jnp.swapaxes(write, 0, 1)  # [c, b, d]
    return jnp.swapaxes(jax.lax.scan(step, jnp.zeros_like(write[:, 0]), by_chunk)[1], 0, 1)


def _compose(first, second):
    """Composes two steps s -> keep * s + write into one."""
    return first[0] * second[0], second[0] * first[1] + second[1]
