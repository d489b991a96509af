"""What every fast implementation is given beside padded, heads-first arrays: the tiles it is to compute.

A tile is a block of queries with a block of keys. Inside, the mask forbids every pair, some, or none; block bounds
(`layers.attention.mask.some_and_all`) tell which, so that no work is done in the first kind and no predicate is
evaluated in the last.

Letters: b rows, m lists per row, i query blocks, j key blocks, l entries of a list, T and S padded lengths.
"""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.attention.block_lists import BlockLists
from layers.attention.mask_spec import MaskSpec, block_bounds, pad_tokens, some_and_all, token_rows

NOTHING, SOME, ALL = 0, 1, 2  # kinds of tiles: pairs that may attend


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static half of a call; equal settings share a compiled program."""

    block_q: int
    block_k: int
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    implementation: str
    interpret: Any  # False, True, or the parameters of one of Pallas's interpreters


class Sizes(NamedTuple):
    """What decides whether a kernel can run."""

    num_query_blocks: int
    num_key_blocks: int
    num_lists: int    # per batch row
    room: int         # entries of a list, used or not
    dtype: jnp.dtype  # of q, k and v
    width: int        # of q and k
    value_width: int


class Tiles(NamedTuple):
    """The traced half, integers only."""

    ids: jax.Array               # [b or 1, m, i, l] key blocks, in range, sorted as `live_first` does
    kinds: jax.Array             # [b or 1, m, i, l] NOTHING (also past the end of a list), SOME or ALL
    q_rows: jax.Array            # [b, 2, T] position and segment of each query; padding has segment 0
    kv_rows: jax.Array           # [b, 2, S]
    row_select: jax.Array | None  # [b, m or 1, w, T]


def make_tiles(blocks: BlockLists, spec: MaskSpec, batch: int, num_queries: int, num_keys: int) -> Tiles:
    rows = token_rows(spec, num_queries, num_keys)
    q_bounds = block_bounds(rows.of_queries, blocks.block_q)
    kv_bounds = block_bounds(rows.of_keys, blocks.block_k)
    is_good = blocks.is_live() & (blocks.ids >= 0) & (blocks.ids < blocks.num_key_blocks)
    shape = (max(blocks.ids.shape[0], rows.of_keys.shape[0], rows.of_queries.shape[0]), *blocks.ids.shape[1:])
    ids = jnp.broadcast_to(jnp.clip(blocks.ids, 0, blocks.num_key_blocks - 1), shape)
    # Row by row: of libtpu 0.0.52, a gather along the last of four axes crashes the compiler.
    take = jax.vmap(lambda of_row, at: of_row[at])
    of_entry = jax.tree.map(lambda x: take(jnp.broadcast_to(x, (shape[0], x.shape[1])), ids), kv_bounds)
    some, everything = some_and_all(spec, jax.tree.map(lambda x: x[:, None, :, None], q_bounds), of_entry)
    kinds = jnp.where(everything, ALL, jnp.where(some, SOME, NOTHING))
    ids, kinds = live_first(ids, jnp.where(is_good, kinds, NOTHING).astype(jnp.int32))
    q_rows = jnp.broadcast_to(rows.of_queries, (batch, 2, num_queries))
    kv_rows = jnp.broadcast_to(rows.of_keys, (batch, 2, num_keys))
    select = spec.row_select
    if select is not None:
        select = pad_tokens(jnp.broadcast_to(select, (batch, *select.shape[1:])), blocks.block_q, axis=3)
    return Tiles(ids, kinds, pad_tokens(q_rows, blocks.block_q, axis=2),
                 pad_tokens(kv_rows, blocks.block_k, axis=2), select)


def transpose(ids: jax.Array, kinds: jax.Array, num_key_blocks: int) -> tuple[jax.Array, jax.Array]:
    """Lists of query blocks for each key block, [b, m, j, i] both, live entries first, each ALL before SOME."""
    dense = jnp.zeros((*ids.shape[:3], num_key_blocks), kinds.dtype)
    at = jnp.where(kinds > NOTHING, ids, num_key_blocks)
    dense = jnp.put_along_axis(dense, at, kinds, axis=-1, inplace=False, mode="drop").swapaxes(-1, -2)
    return live_first(jnp.broadcast_to(jnp.arange(dense.shape[-1], dtype=jnp.int32), dense.shape), dense)


def live_first(ids: jax.Array, kinds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sorts each list by kind, ALL, SOME, then NOTHING, and in a kind by block."""
    # One sort of one integer: the kind above the block, of which there are fewer than 2^24.
    keys = jnp.sort(((ALL - kinds) << 24) | ids, axis=-1)
    return keys & ((1 << 24) - 1), ALL - (keys >> 24)
