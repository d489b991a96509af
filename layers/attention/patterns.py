"""Ways to choose what attention reads: small functions over `block_sparse_attention`, and a linen layer for them.

Each takes q [b, t, h, k], k and v [b, t, n, k] of the same tokens and `segment_ids` [b, t] (0 = padding; None =
one per row), and returns [b, t, h, v]. All are causal. Other keywords, such as `implementation`, are those of
`block_sparse_attention`.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from layers.array_types import Array, Bool, Float, Int, typed
from layers.arrays.segments import segment_positions
from layers.attention.block_lists import BlockLists
from layers.attention.block_sparse import block_sparse_attention
from layers.attention.mask import MaskSpec, pack_row_select
from layers.nn.linear import Linear
from layers.nn.rotary import rotary

Segments = Int[Array, "b t"] | None


@typed
def sliding_window_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, window: int, block: int = 128, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """Token i sees i - window .. i (Longformer, arXiv 2004.05150)."""
    length = q.shape[1]
    blocks = BlockLists.from_mask_spec(MaskSpec(window=window), length, length, block_q=block, block_k=block)
    mask = MaskSpec(window=window, segment_ids=segment_ids)
    return block_sparse_attention(q, k, v, blocks, mask=mask, **keywords)


@typed
def document_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, block: int = 128, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """Token i sees all earlier tokens of its segment: blocks between documents are not even read."""
    length = q.shape[1]
    mask = MaskSpec(segment_ids=segment_ids)
    blocks = BlockLists.from_mask_spec(mask, length, length, block_q=block, block_k=block)
    return block_sparse_attention(q, k, v, blocks, mask=mask, **keywords)


@typed
def big_bird_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, num_near: int = 3, num_global: int = 1, num_random: int = 2, seed: int = 0,
    block: int = 128, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """Blocks see the `num_near` newest, the first `num_global` and `num_random` others: BigBird, arXiv 2007.14062.

    The random blocks are drawn from `seed` once, earlier ones only, and are the same for all rows and heads.
    """
    count = -(-q.shape[1] // block)
    i, j = np.arange(count)[:, None], np.arange(count)[None]
    wanted = ((i - j < num_near) | (j < num_global)) & (j <= i)
    rng = np.random.default_rng(seed)
    for row in range(count):
        others = np.flatnonzero(~wanted[row, :row])
        wanted[row, rng.permutation(others)[:num_random]] = True
    blocks = BlockLists.from_block_mask(
        jnp.asarray(wanted[None, None]), block_q=block, block_k=block, max_blocks=int(wanted.sum(axis=1).max()))
    return block_sparse_attention(q, k, v, blocks, mask=MaskSpec(segment_ids=segment_ids), **keywords)


@typed
def dilated_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, window: int, dilation: int, block: int = 128, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """Token i sees i, i - dilation, i - 2 dilation, .. down to i - window (Longformer, arXiv 2004.05150, 3.1)."""
    if dilation < 1:
        raise ValueError(f"dilation {dilation} must be at least 1, which is a plain window")
    # Tokens of one remainder next to each other see a plain window, of what were `dilation` tokens apart.
    batch, length = q.shape[:2]
    padded = -(-length // dilation) * dilation
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)

    def gathered(x):
        x = jnp.pad(x, [(0, 0), (0, padded - length), *[(0, 0)] * (x.ndim - 2)])
        x = x.reshape(batch, -1, dilation, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(batch * dilation, -1, *x.shape[3:])

    y = sliding_window_attention(
        *map(gathered, (q, k, v, segment_ids)), window=window // dilation, block=block, **keywords)
    y = y.reshape(batch, dilation, -1, *y.shape[2:]).swapaxes(1, 2)
    return y.reshape(batch, padded, *y.shape[3:])[:, :length]


@typed
def moba_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    segment_ids: Segments = None, *, top_k: int, block: int = 128, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """Each token and head sees its own block and the top_k - 1 earlier ones whose mean key fits its query best.

    MoBA, arXiv 2502.13189, eqs. 2-6. The choice has no gradient. Blocks are of the row: a block that holds two
    documents is scored by the mean of both, and read for the keys of the token's own.
    """
    if top_k < 1:
        raise ValueError(f"top_k {top_k} must be at least 1, a token's own block")
    num_groups = q.shape[2] // k.shape[2]
    count = -(-k.shape[1] // block)
    queries = q.reshape(*q.shape[:2], -1, num_groups, q.shape[-1]).astype(jnp.float32)
    scores = jnp.einsum("btngk,bjnk->bngtj", queries, block_means(k, segment_ids, block))
    own = jnp.arange(q.shape[1]) // block
    is_earlier = jnp.arange(count) < own[:, None]
    chosen = best(jnp.where(is_earlier, scores, -jnp.inf), top_k - 1) | (jnp.arange(count) == own[:, None])
    chosen = chosen.reshape(q.shape[0], q.shape[2], *chosen.shape[3:])  # [b, h, t, j]
    return selected_blocks_attention(q, k, v, chosen, segment_ids, block=block, **keywords)


@typed
def selected_blocks_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b t n k"], v: Float[Array, "b t n v"],
    chosen: Bool[Array, "b m t j"], segment_ids: Segments = None, *, block: int = 128, **keywords: Any,
) -> Float[Array, "b t h v"]:
    """Each token sees the blocks chosen for it, of keys at or before it; m = 1, n or h choices per token."""
    length, count = q.shape[1], chosen.shape[-1]
    by_block = jnp.pad(chosen, ((0, 0), (0, 0), (0, -length % block), (0, 0)))
    by_block = jnp.any(by_block.reshape(*chosen.shape[:2], -1, block, count), axis=3)
    blocks = BlockLists.from_block_mask(by_block, block_q=block, block_k=block)
    mask = MaskSpec(segment_ids=segment_ids, row_select=pack_row_select(chosen))
    return block_sparse_attention(q, k, v, blocks, mask=mask, **keywords)


@typed
def paged_attention(
    q: Float[Array, "b h k"], k_pages: Float[Array, "p s n k"], v_pages: Float[Array, "p s n v"],
    page_table: Int[Array, "b l"], lengths: Int[Array, "b"], page_positions: Int[Array, "p s"], **keywords: Any,
) -> Float[Array, "b h v"]:
    """One query per row against pages of a cache that all rows share: a decoding step.

    Args:
      page_table: the pages of each row, in any order; a row may share pages with another.
      lengths: tokens of each row that are in the cache, the newest of which is the query's own; its pages are the
        first ceil(length / s) of its row in the table.
      page_positions: position in its row of the token in each slot; slots past a row's length are not read.
    """
    num_pages, page = k_pages.shape[:2]
    counts = -(-lengths // page)
    blocks = BlockLists.from_ids(
        counts[None, None], page_table[None, None], block_q=1, block_k=page, num_key_blocks=num_pages)
    mask = MaskSpec(positions=lengths[None] - 1, kv_positions=page_positions.reshape(1, -1))
    flat = [pages.reshape(1, num_pages * page, *pages.shape[2:]) for pages in (k_pages, v_pages)]
    return block_sparse_attention(q[None], *flat, blocks, mask=mask, **keywords)[0]


@typed
def block_means(x: Float[Array, "b t n k"], segment_ids: Segments, block: int) -> Float[Array, "b j n k"]:
    """The mean over the real tokens of each block, in float32; 0 for a block of padding."""
    is_real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids != 0
    padding = -x.shape[1] % block
    is_real = jnp.pad(is_real, ((0, 0), (0, padding))).reshape(x.shape[0], -1, block, 1, 1)
    blocks = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, padding), (0, 0), (0, 0)))
    blocks = blocks.reshape(x.shape[0], -1, block, *x.shape[2:])
    return jnp.sum(blocks * is_real, axis=2) / jnp.maximum(jnp.sum(is_real, axis=2), 1)


def best(scores: jax.Array, k: int) -> jax.Array:
    """True at the k highest along the last axis, of equals the first ones; never at -inf."""
    k = min(k, scores.shape[-1])
    if k == 0:
        return jnp.zeros(scores.shape, bool)
    _, ids = jax.lax.top_k(scores, k)
    chosen = jnp.any(ids[..., None] == jnp.arange(scores.shape[-1]), axis=-2)
    return chosen & (scores > -jnp.inf)


class SparseAttention(nn.Module):
    """Causal self-attention with rotary positions that reads what `attend` chooses, without biases.

      SparseAttention(num_heads=8, num_key_heads=2, attend=functools.partial(moba_attention, top_k=4))

    Attributes:
      num_heads, num_key_heads: of queries, which must divide the width, and of keys, which must divide those.
      attend: one of this module's functions, with its own arguments filled in.
      rotary_width: features of each head that are rotated; 0 = none.
    """

    num_heads: int
    num_key_heads: int
    attend: Callable[..., jax.Array]
    rotary_width: int = 0
    init_std: float = 0.02
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b t d"], segment_ids: Segments = None) -> Float[Array, "b t d"]:
        project = partial(project_heads, init_std=self.init_std, rotary_width=self.rotary_width, dtype=self.dtype)
        q, k, v = project(x, segment_ids, num_heads=self.num_heads, num_key_heads=self.num_key_heads)
        return Linear((x.shape[-1],), ("heads", "head_width", "embed"), init_std=self.init_std, dtype=self.dtype,
                      name="out")(self.attend(q, k, v, segment_ids))


def project_heads(
    x: jax.Array, segment_ids: jax.Array | None, *, num_heads: int, num_key_heads: int, init_std: float,
    rotary_width: int, dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes the q, k and v of a layer, with parameters "q", "k" and "v"; called inside its compact method."""
    width = x.shape[-1]
    if width % num_heads or num_heads % num_key_heads:
        raise ValueError(f"num_key_heads {num_key_heads} must divide num_heads {num_heads}, which must divide the "
                         f"width {width}")

    def project(name: str, count: int) -> jax.Array:
        axes = ("embed", "heads", "head_width")
        return Linear((count, width // num_heads), axes, init_std=init_std, dtype=dtype, name=name)(x)

    if segment_ids is None:
        segment_ids = jnp.ones(x.shape[:2], jnp.int32)
    positions = segment_positions(segment_ids)
    q, k = (rotary(project(name, count), positions, width=rotary_width)
            for name, count in (("q", num_heads), ("k", num_key_heads)))
    return q, k, project("v", num_key_heads)
