"""Losses that steer the fraction of tokens that start a chunk.

With F the fraction of real tokens that are boundaries, which carries no gradient, G their mean probability, and N
the compression wanted, in tokens per chunk:

  hnet    N / (N - 1) * ((N - 1) F G + (1 - F)(1 - G)): 1 at F = G = 1 / N; H-Net (arXiv 2507.07955) eq. 10
  hinge   max(0, N F - 1), with the gradient of N G: only more boundaries than 1 / N cost, as in FlexiTokens
          (arXiv 2507.12720)
  none    0
"""
from typing import Literal

import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Scalar, typed

RatioObjective = Literal["hnet", "hinge", "none"]


@typed
def ratio_loss(
    boundary_prob: Float[Array, "b t"],
    boundary_mask: Bool[Array, "b t"],
    is_real: Bool[Array, "b t"],
    compression: Scalar,
    *,
    objective: RatioObjective = "hnet",
    num_groups: int = 1,
) -> Float[Array, ""]:
    """Pulls the fraction of boundaries towards 1 / compression.

    Args:
      is_real: F and G are over these tokens.
      compression: N, tokens per chunk, > 1; may be traced, to follow a schedule.
      num_groups: rows are split, in order, into this many groups, each with an F and a G of its own, whose losses
        are averaged; 1 = statistics of the whole batch.
    Raises:
      ValueError: the rows do not divide into the groups.
    """
    if boundary_mask.shape[0] % num_groups:
        raise ValueError(f"{boundary_mask.shape[0]} rows do not divide into {num_groups} groups")

    def fraction(values: jax.Array) -> jax.Array:
        summed = jnp.sum(jnp.where(is_real, values, 0).reshape(num_groups, -1), axis=1, dtype=jnp.float32)
        count = jnp.sum(is_real.reshape(num_groups, -1), axis=1, dtype=jnp.float32)
        return summed / jnp.maximum(count, 1)

    f, g = fraction(boundary_mask), fraction(boundary_prob)
    if objective == "none":
        return jnp.zeros((), jnp.float32)
    if objective == "hinge":
        g_valued_f = g + jax.lax.stop_gradient(f - g)
        return jnp.mean(jnp.where(compression * f > 1, compression * g_valued_f - 1, 0.0))
    return jnp.mean(compression / (compression - 1) * ((compression - 1) * f * g + (1 - f) * (1 - g)))
