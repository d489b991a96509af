"""Attention from new tokens to a cache and to each other."""
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, typed
from layers.arrays.dispatch import by_platform
from layers.attention.attend import attend
from layers.attention.attended import Attended, merge
from layers.attention.mask import CAUSAL, SAME_SEGMENT, Mask, TokenInfo, pairs
from layers.cache.kv_cache import KVCache, KVUpdate, Placement

FEW_QUERIES = 64  # their scores are few, even of a long cache


class CachedAttention(NamedTuple):
    """The result of `cached_attention`."""

    o: jax.Array                # [b, t, h, v]
    received: jax.Array | None  # [b, n, s] float32: the attention that each slot received, if it was asked for


@typed
def cached_attention(
    q: Float[Array, "b t h k"], cache: KVCache, new: KVUpdate, placement: Placement, *,
    mask: Mask = CAUSAL & SAME_SEGMENT, with_received: bool = False,
) -> CachedAttention:
    """Attends from new tokens to those in the cache and to each other, by their positions and segments.

    The cache is only read, where it is. A query that sees nothing, such as padding, gets 0. Matmuls run in the
    dtype of q, whatever that of the cache. New keys and values should be rounded to that of the cache already, so
    that tokens count the same whether they come in one call or in several.

    Args:
      placement: of the new tokens, from `place`.
      with_received: sum the weights of each slot over the new tokens and the query heads that share its key.
    """
    tokens = TokenInfo(placement.positions[:, None], placement.segments[:, None])
    slots = TokenInfo(cache.positions, placement.in_cache)
    log_weight = cache.log_weight
    if log_weight is not None:
        log_weight = jnp.broadcast_to(log_weight, cache.k.shape[:3])
    # Free slots hold zeros or tokens of an earlier segment; without a copy that hides them, all are read in place.
    k, v = (x.swapaxes(1, 2).astype(q.dtype) for x in (cache.k, cache.v))
    to_cache = _attend(mask, q, k, v, tokens, slots, log_weight, padding_is_finite=True)
    to_new = _attend(mask, q, new.k.astype(q.dtype), new.v.astype(q.dtype), tokens, tokens, None)
    o, lse = merge(to_cache, to_new)
    received = _received(q, cache, pairs(mask, tokens, slots), lse) if with_received else None
    return CachedAttention(o.astype(q.dtype), received)


def _attend(
    mask: Mask, q: jax.Array, k: jax.Array, v: jax.Array, q_tokens: TokenInfo, kv_tokens: TokenInfo,
    key_bias: jax.Array | None, *, padding_is_finite: bool = False,
) -> Attended:
    """Runs `attend`, on CPUs in blocks where there are many queries."""
    def run(q, k, v, q_tokens, kv_tokens, key_bias, implementation="auto"):
        return attend(q, k, v, mask=mask, q_tokens=q_tokens, kv_tokens=kv_tokens, key_bias=key_bias,
                      padding_is_finite=padding_is_finite, implementation=implementation)

    operands = q, k, v, q_tokens, kv_tokens, key_bias
    if q.shape[1] <= FEW_QUERIES:
        return run(*operands)
    blockwise = partial(run, implementation="blockwise")
    return by_platform("cached attention", {"cpu": blockwise, "default": run}, *operands)


def _received(q: jax.Array, cache: KVCache, allowed: jax.Array, lse: jax.Array) -> jax.Array:
    """Sums the weights of each slot, [b, n, s], from the log-sum-exp over all keys."""
    batch, length, _, width = q.shape
    num_key_heads = cache.k.shape[1]
    queries = q.reshape(batch, length, num_key_heads, -1, width)
    scores = jnp.einsum("btngk,bnsk->bngts", queries, cache.k, preferred_element_type=jnp.float32) / width**0.5
    if cache.log_weight is not None:
        scores += cache.log_weight[:, :, None, None]
    lse = lse.reshape(batch, num_key_heads, -1, length, 1)
    weights = jnp.where(allowed[:, :, None], jnp.exp(jnp.where(allowed[:, :, None], scores - lse, 0)), 0)
    return jnp.sum(weights, axis=(2, 3))
