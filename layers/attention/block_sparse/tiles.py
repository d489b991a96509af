"""Inputs that all fast implementations share, besides the padded arrays: tiles to compute, and static settings.

A tile is a block of queries with a block of keys. Inside, the mask forbids every pair, some, or none; block bounds
(`layers.attention.bounds`) tell which, so that no work is done in the first kind and no predicate is evaluated in
the last.

Letters: b rows, m lists per row, i query blocks, j key blocks, l entries of a list, T and S padded lengths,
f fields of a token (position, segment and, where the mask reads them, bits), p heads with fields of their own.
"""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.attention.block_lists import BlockLists
from layers.attention.bounds import block_bounds, pad_tokens, some_and_all
from layers.attention.mask import Bits, Causal, Mask, SameSegment, TokenInfo, Window

NOTHING, SOME, ALL = 0, 1, 2  # kinds of tiles: pairs that may attend
MASKS_OF_KERNELS = (Causal, Window, SameSegment, Bits)


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
    """The static half of a call; equal settings share a compiled program."""

    block_q: int
    block_k: int
    mask: Mask
    softcap: float | None
    scale: float
    implementation: str
    interpret: Any  # False, True, or the parameters of one of Pallas's interpreters


class Sizes(NamedTuple):
    """The facts, besides the settings, that decide whether a kernel can run."""

    num_query_blocks: int
    num_key_blocks: int
    num_lists: int         # per batch row
    list_length: int       # entries of a list, used or not
    dtype: jnp.dtype       # of q, k and v
    width: int             # of q and k
    value_width: int
    has_key_bias: bool = False
    tokens_per_head: bool = False  # whether positions differ from key head to key head


class Tiles(NamedTuple):
    """The traced half, integers only."""

    ids: jax.Array        # [b or 1, m, i, l] key blocks, in range, sorted as `live_first` does
    kinds: jax.Array      # [b or 1, m, i, l] NOTHING (also past the end of a list), SOME or ALL
    q_tokens: jax.Array   # [b, p, f, T]; padding has segment 0
    kv_tokens: jax.Array  # [b, p, f, S]
    rows: jax.Array | None  # [b, m or 1, w, T]


def make_tiles(
    blocks: BlockLists, mask: Mask, q_tokens: TokenInfo, kv_tokens: TokenInfo, *, batch: int
) -> Tiles:
    """Finds the kind of each listed tile, and lays out the fields of tokens as implementations read them."""
    q_bounds, kv_bounds = block_bounds(q_tokens, blocks.block_q), block_bounds(kv_tokens, blocks.block_k)
    (q_rows, q_heads, _), (kv_rows, kv_heads, _) = q_bounds.is_padding.shape, kv_bounds.is_padding.shape
    num_heads = max(q_heads, kv_heads)
    shape = (max(blocks.ids.shape[0], q_rows, kv_rows), max(blocks.ids.shape[1], num_heads), *blocks.ids.shape[2:])
    is_good = blocks.is_live() & (blocks.ids >= 0) & (blocks.ids < blocks.num_key_blocks)
    ids = jnp.broadcast_to(jnp.clip(blocks.ids, 0, blocks.num_key_blocks - 1), shape)

    def per_list(x: jax.Array) -> jax.Array:
        return x if x.shape[1] == 1 else jnp.repeat(x, shape[1] // x.shape[1], axis=1)

    def take_blocks(x: jax.Array) -> jax.Array:
        x = per_list(x)
        x = jnp.broadcast_to(x, (shape[0], *x.shape[1:]))
        # Row by row: of libtpu 0.0.52, a gather along the last of four axes crashes the compiler.
        take = jax.vmap(lambda row, at: row[at])
        return take(x[:, 0], ids) if x.shape[1] == 1 else jax.vmap(take)(x, ids)

    some, everything = some_and_all(
        mask, jax.tree.map(lambda x: per_list(x)[..., None], q_bounds), jax.tree.map(take_blocks, kv_bounds))
    if blocks.rows is not None:  # with a choice per query, no tile is known to be full
        everything = jnp.zeros_like(everything)
    kinds = jnp.where(everything, ALL, jnp.where(some, SOME, NOTHING))
    ids, kinds = live_first(ids, jnp.where(is_good, kinds, NOTHING).astype(jnp.int32))
    rows = blocks.rows
    if rows is not None:
        rows = pad_tokens(jnp.broadcast_to(rows, (batch, *rows.shape[1:])), blocks.block_q, axis=3)
    return Tiles(ids, kinds, _fields(q_tokens, mask, batch, blocks.block_q),
                 _fields(kv_tokens, mask, batch, blocks.block_k), rows)


def _fields(tokens: TokenInfo, mask: Mask, batch: int, block: int) -> jax.Array:
    """[b, p, f, T], padded to whole blocks."""
    reads_bits = not all(isinstance(leaf, Causal | Window | SameSegment) for leaf in mask.leaves())
    fields = [x for x in (tokens if reads_bits else tokens[:2]) if x is not None]
    num_heads = max(x.shape[1] for x in fields)
    shape = (batch, num_heads, fields[0].shape[2])
    return pad_tokens(
        jnp.stack([jnp.broadcast_to(x, shape).astype(jnp.int32) for x in fields], axis=2), block, axis=3)


def as_tokens(fields: jax.Array, axis: int) -> TokenInfo:
    """Takes the stacked fields of tokens apart again."""
    return TokenInfo(*jnp.moveaxis(fields, axis, 0))


def lacks_in_kernels(settings: AttentionSettings, sizes: Sizes) -> str | None:
    """Says why no kernel can run a call, whichever the platform; None if one might."""
    for leaf in settings.mask.leaves():
        if type(leaf) not in MASKS_OF_KERNELS:
            known = ", ".join(kind.__name__ for kind in MASKS_OF_KERNELS)
            return f"the mask has {type(leaf).__name__}; kernels evaluate {known}"
    if sizes.tokens_per_head:
        return "positions differ from key head to key head; kernels read one position per token"
    return "key_bias is not among what the kernel reads" if sizes.has_key_bias else None


def transpose(ids: jax.Array, kinds: jax.Array, num_key_blocks: int) -> tuple[jax.Array, jax.Array]:
    """Lists the query blocks of each key block, [b, m, j, i] both, live entries first, each ALL before SOME."""
    dense = jnp.zeros((*ids.shape[:3], num_key_blocks), kinds.dtype)
    at = jnp.where(kinds > NOTHING, ids, num_key_blocks)
    dense = jnp.put_along_axis(dense, at, kinds, axis=-1, inplace=False, mode="drop").swapaxes(-1, -2)
    return live_first(jnp.broadcast_to(jnp.arange(dense.shape[-1], dtype=jnp.int32), dense.shape), dense)


def live_first(ids: jax.Array, kinds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sorts each list by kind, ALL, SOME, then NOTHING, and in a kind by block."""
    # One sort of one integer: the kind above the block, of which there are fewer than 2^24.
    keys = jnp.sort(((ALL - kinds) << 24) | ids, axis=-1)
    return keys & ((1 << 24) - 1), ALL - (keys >> 24)
