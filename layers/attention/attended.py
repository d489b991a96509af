"""The result of attention over a set of keys, and operations on it."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, typed


class Attended(NamedTuple):
    """Attention over a set of keys. A query that sees none of them has o = 0 and lse = -inf.

    Attributes:
      o: [b, t, h, v], in the dtype of the values.
      lse: [b, h, t] float32, the log of each softmax's denominator.
    """

    o: Array
    lse: Array


def merge(*branches: Attended) -> Attended:
    """Merges attention over disjoint sets of keys by their log-sum-exps.

    The result and its gradients are those of attention over the union, and finite where no branch sees a key.
    """
    lses = jnp.stack([branch.lse for branch in branches])
    highest = jax.lax.stop_gradient(jnp.max(lses, axis=0))
    # Two queries that see nothing would differ by -inf - -inf: they are shifted by 0.
    highest = jnp.where(highest == -jnp.inf, 0, highest)
    weights = jnp.exp(lses - highest)
    total = jnp.sum(weights, axis=0)
    sees_any = total > 0
    total = jnp.where(sees_any, total, 1)
    shares = (weights / total).swapaxes(2, 3)[..., None]  # [branch, b, t, h, 1]
    o = sum(share * branch.o.astype(jnp.float32) for share, branch in zip(shares, branches, strict=True))
    return Attended(o.astype(branches[0].o.dtype), jnp.where(sees_any, highest + jnp.log(total), -jnp.inf))


@typed
def add_sinks(o: Float[Array, "b t h v"], lse: Float[Array, "b h t"], sinks: Float[Array, "h"]) -> Attended:
    """Adds to each query's keys one of logit `sinks` and value 0 (arXiv 2309.17453, learned)."""
    sinks = sinks.astype(jnp.float32)[:, None]
    kept = jax.nn.sigmoid(lse - sinks)  # 0 where a query sees nothing, which then sees the sink alone
    return Attended((o * kept.swapaxes(1, 2)[..., None]).astype(o.dtype), jnp.logaddexp(lse, sinks))
