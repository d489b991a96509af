"""Choices of blocks that begin with their segment: for packed rows, and for keys that come from a cache.

The ops for whole rows cut a row into blocks from its first token. Here every segment is cut from its own, so that
it is read as if it stood alone. All scores of a few queries at a time are computed: exact anywhere, at the cost of
dense attention.
"""
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Int, typed
from layers.arrays.choose import choose
from layers.attention.dense import attend_dense
from layers.attention.mask import TokenInfo


class KeyBlocks(NamedTuple):
    """The blocks that keys fall into, j of them, some of which may hold no key."""

    of_key: jax.Array   # [b, s] int32: the block of each key; j at padding
    segment: jax.Array  # [b, j] int32; 0 for a block without keys
    index: jax.Array    # [b, j] int32: place of the block in its segment
    count: jax.Array    # [b, j] int32: keys that it holds

    @classmethod
    def from_tokens(cls, tokens: TokenInfo, num_new: int, block: int) -> "KeyBlocks":
        """Cuts segments into blocks.

        Args:
          tokens: of the keys, [b, 1, s]. Segment 1 may be in any order; later ones are in order, one after the
            other, among the last `num_new` keys.
        """
        position, segment = tokens.position[:, 0], tokens.segment[:, 0]
        num_first = -(-position.shape[1] // block)  # blocks that segment 1 may have
        num_blocks = num_first + num_new
        begins = (segment > 1) & (position % block == 0)
        later = num_first - 1 + jnp.cumsum(begins, axis=1, dtype=jnp.int32)
        of_key = jnp.where(segment > 1, later, jnp.where(segment == 1, position // block, num_blocks))
        row = jnp.arange(position.shape[0])[:, None]
        empty = jnp.zeros((position.shape[0], num_blocks), jnp.int32)
        return cls(
            of_key,
            segment=empty.at[row, of_key].max(segment, mode="drop"),
            index=empty.at[row, of_key].max(position // block, mode="drop"),
            count=empty.at[row, of_key].add(1, mode="drop"))

    def total(self, x: Float[Array, "b s n k"]) -> Float[Array, "b j n k"]:
        """Sums the keys of each block in float32."""
        row = jnp.arange(x.shape[0])[:, None]
        total = jnp.zeros((*self.segment.shape, *x.shape[2:]), jnp.float32)
        return total.at[row, self.of_key].add(x.astype(jnp.float32), mode="drop")

    def open_keys(self, is_chosen: Bool[Array, "b m t j"]) -> Bool[Array, "b m t s"]:
        """Marks the keys of the chosen blocks."""
        index = jnp.minimum(self.of_key, is_chosen.shape[-1] - 1)[:, None, None]
        return jnp.take_along_axis(is_chosen, index, axis=-1) & (self.of_key < is_chosen.shape[-1])[:, None, None]


@typed
def moba_in_segments(
    q: Float[Array, "b t h k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n v"],
    q_tokens: TokenInfo, kv_tokens: TokenInfo, *, top_k: int, block: int = 128,
) -> Float[Array, "b t h v"]:
    """Runs `moba_attention` on segments that each begin a block of their own.

    Args:
      q_tokens, kv_tokens: positions in the segment, and segments, as `KeyBlocks.from_tokens` asks for them.
    """
    blocks = KeyBlocks.from_tokens(kv_tokens, q.shape[1], block)
    means = blocks.total(k) / jnp.maximum(blocks.count, 1)[:, :, None, None]
    num_groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, num_groups, axis=2), jnp.repeat(v, num_groups, axis=2)

    def few(q, position, segment):
        queries = q.reshape(*q.shape[:2], -1, num_groups, q.shape[-1]).astype(jnp.float32)
        scores = jnp.einsum("btngk,bjnk->bngtj", queries, means)
        scores = scores.reshape(q.shape[0], q.shape[2], *scores.shape[3:])
        is_same, own = segment[:, :, None] == blocks.segment[:, None], (position // block)[:, :, None]
        is_earlier = is_same & (blocks.index[:, None] < own)  # [b, t, j]
        is_chosen = choose(scores, top_k=top_k - 1, is_forbidden=~is_earlier[:, None]).is_chosen
        is_chosen |= (is_same & (blocks.index[:, None] == own))[:, None]
        allowed = blocks.open_keys(is_chosen) & _is_past(position, segment, kv_tokens)
        return attend_dense(q, k, v, allowed, scale=q.shape[-1] ** -0.5, reads_lse=True).o

    return _by_queries(few, block, q, q_tokens.position[:, 0], q_tokens.segment[:, 0])


@typed
def native_sparse_in_segments(
    q: Float[Array, "b t h k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n v"],
    gates: Float[Array, "b t h 3"], k_weights: Float[Array, "w n"], v_weights: Float[Array, "w n"],
    q_tokens: TokenInfo, kv_tokens: TokenInfo, *, num_selected: int, window: int,
) -> Float[Array, "b t h v"]:
    """Runs `native_sparse_attention` on segments that each begin a block of their own.

    Args:
      k_weights, v_weights: weights of the keys and values of a block, whose length they give, in its summary.
      q_tokens, kv_tokens: as in `moba_in_segments`.
    """
    block = k_weights.shape[0]
    blocks = KeyBlocks.from_tokens(kv_tokens, q.shape[1], block)
    place = kv_tokens.position[:, 0] % block
    summary_k = blocks.total(k * k_weights[place][..., None].astype(k.dtype)).astype(k.dtype)
    summary_v = blocks.total(v * v_weights[place][..., None].astype(v.dtype)).astype(v.dtype)
    num_groups = q.shape[2] // k.shape[2]

    def few(q, gates, position, segment):
        queries = q.reshape(*q.shape[:2], -1, num_groups, q.shape[-1])
        is_same, own = segment[:, :, None] == blocks.segment[:, None], (position // block)[:, :, None]
        index = blocks.index[:, None]
        has_passed = is_same & ((index + 1) * block <= position[:, :, None] + 1) & (blocks.count == block)[:, None]
        scale = q.shape[-1] ** -0.5
        dense = partial(attend_dense, q, scale=scale, reads_lse=True)
        of_summaries = dense(summary_k, summary_v, has_passed[:, None])

        queries, keys = jax.lax.stop_gradient((queries, summary_k))
        scores = jnp.einsum("btngk,bjnk->bngtj", queries.astype(jnp.float32), keys.astype(jnp.float32))
        lse = jax.lax.stop_gradient(of_summaries.lse).reshape(*scores.shape[:-1], 1)
        visible = has_passed[:, None, None]
        shares = jnp.where(visible, jnp.exp(jnp.where(visible, scale * scores - lse, 0)), 0)
        always = is_same & ((index == 0) | ((index <= own) & (index >= own - 1)))
        is_chosen = choose(
            jnp.sum(shares, axis=2), top_k=num_selected, is_forced=always[:, None],
            is_forbidden=~(is_same & (index <= own))[:, None]).is_chosen  # [b, n, t, j]
        is_past = _is_past(position, segment, kv_tokens)
        of_selected = dense(k, v, blocks.open_keys(is_chosen) & is_past)
        is_near = (position[:, :, None] - kv_tokens.position <= window)[:, None]
        of_window = dense(k, v, is_past & is_near)
        branches = jnp.stack([of_summaries.o, of_selected.o, of_window.o], axis=-1)
        return jnp.einsum("bthvi,bthi->bthv", branches, gates.astype(branches.dtype))

    return _by_queries(few, block, q, gates, q_tokens.position[:, 0], q_tokens.segment[:, 0])


@typed
def begin_with_the_row(tokens: TokenInfo) -> Bool[Array, ""]:
    """Tells whether every row is one segment from its first token on, with padding behind at most."""
    is_in_place = (tokens.segment == 1) & (tokens.position == jnp.arange(tokens.position.shape[-1]))
    return jnp.all(is_in_place | (tokens.segment == 0))


def _is_past(position: Int[Array, "b t"], segment: Int[Array, "b t"], kv: TokenInfo) -> Bool[Array, "b 1 t s"]:
    is_same = (segment[:, :, None] == kv.segment) & (segment != 0)[:, :, None]  # [b, t, s]
    return (is_same & (kv.position <= position[:, :, None]))[:, None]


def _by_queries(function: Callable[..., Any], size: int, *queries: Array) -> Array:
    """Calls `function` on `size` queries at a time, which bounds its memory, and again in the backward pass."""
    length = queries[0].shape[1]
    if length <= size:
        return function(*queries)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    y = jax.lax.map(lambda few: jax.checkpoint(function)(*few), tuple(map(split, queries)))
    return y.swapaxes(0, 1).reshape(y.shape[1], -1, *y.shape[3:])[:, :length]
