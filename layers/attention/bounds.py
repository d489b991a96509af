"""Bounds of blocks of tokens, from which masks tell the tiles that hold no allowed pair, some, or all.

A tile is a block of queries with a block of keys.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.attention.mask import Mask, TokenInfo


class BlockBounds(NamedTuple):
    """Ranges over the real tokens of each block: [r, p, blocks], int32 and bool. Blocks of padding have zeros."""

    first_position: jax.Array
    last_position: jax.Array
    first_segment: jax.Array
    last_segment: jax.Array
    any_bits: jax.Array | None     # of some token
    common_bits: jax.Array | None  # of all tokens
    has_padding: jax.Array
    is_padding: jax.Array


def block_bounds(tokens: TokenInfo, block: int) -> BlockBounds:
    """Finds the bounds of blocks of `block` tokens; the last may be shorter."""
    shape = jnp.broadcast_shapes(*(x.shape for x in tokens if x is not None))

    def in_blocks(x: jax.Array) -> jax.Array:
        x = pad_tokens(jnp.broadcast_to(jnp.asarray(x, jnp.int32), shape), block, axis=2)
        return x.reshape(*x.shape[:2], -1, block)

    position, segment, bits = jax.tree.map(in_blocks, tokens)
    is_real = segment != 0
    has_padding, is_padding = ~jnp.all(is_real, axis=-1), ~jnp.any(is_real, axis=-1)
    largest = jnp.iinfo(jnp.int32).max

    def range_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The empty ranges of padding would overflow in a difference.
        lowest = jnp.min(jnp.where(is_real, x, largest), axis=-1)
        highest = jnp.max(jnp.where(is_real, x, -largest), axis=-1)
        return jnp.where(is_padding, 0, lowest), jnp.where(is_padding, 0, highest)

    some_bits = common_bits = None
    if bits is not None:
        some_bits = _reduce_bits(jnp.where(is_real, bits, 0), 0, jax.lax.bitwise_or)
        common_bits = _reduce_bits(jnp.where(is_real, bits, -1), -1, jax.lax.bitwise_and)
    return BlockBounds(*range_of(position), *range_of(segment), some_bits, common_bits, has_padding, is_padding)


def some_and_all(mask: Mask, q: BlockBounds, kv: BlockBounds) -> tuple[jax.Array, jax.Array]:
    """Tells whether some query of a block may see some key of another, and whether all may see all.

    The first may be True where no pair is allowed, the second False where all are: bounds tell no more.
    """
    some, everything = mask.bounds(q, kv)
    return some & ~q.is_padding & ~kv.is_padding, everything & ~q.has_padding & ~kv.has_padding


def pad_tokens(x: jax.Array, block: int, *, axis: int) -> jax.Array:
    """Appends zeros, which are padding as segments are, up to whole blocks."""
    missing = -x.shape[axis] % block
    return x if missing == 0 else jnp.pad(x, [(0, missing if at == axis else 0) for at in range(x.ndim)])


def _reduce_bits(x: jax.Array, start: int, join) -> jax.Array:
    return jax.lax.reduce(x, jnp.int32(start), join, (x.ndim - 1,))
