"""Block-sparse attention in plain XLA: loops over tiles with running softmax statistics, on any platform.

Scores exist for one block of queries and a few blocks of keys at a time, and a loop ends with the longest list of
the rows and heads it serves: work follows the lists, not the room in them. FlashAttention-2 (arXiv 2307.08691),
algorithms 1 and 2, over lists.

Letters: n heads that have a list of their own (key heads, or query heads if their lists differ), g query heads of
each, i and j blocks of queries and of keys, x and y tokens in one, e entries of a list read in one turn of a loop.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.block_sparse_attention.tiles import NOTHING, Settings, Tiles, live_first, transpose
from layers.mask_spec import is_selected, may_attend

TOKENS_PER_TURN = 512  # more make larger matmuls, and more work past the end of a list


def forward(
    settings: Settings, q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """q [b, h, T, k], k [b, hk, S, k], v [b, hk, S, v] -> o [b, h, T, v] in v's dtype, lse [b, h, T] float32."""
    blocks = _Blocks.of(settings, k, v, tiles, q)
    (queries,) = blocks.of_queries
    lists = _Lists.of(*live_first(blocks.ids, blocks.kinds), settings.block_k)

    def row(i):
        def attend(turn, carry):
            highest, total, acc = carry
            at, is_live = lists.entries(i, turn)
            scores, _ = _scores(settings, "bngxk,bneyk->bngxey", queries[:, :, i], _take(blocks.k, at))
            scores = jnp.where(_allowed_in_row(settings, blocks, i, at, is_live), scores, -jnp.inf)
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=(-2, -1)))
            shift = jnp.where(new_highest == -jnp.inf, 0, new_highest)
            weights = jnp.exp(scores - shift[..., None, None])
            kept = jnp.exp(highest - shift)
            total = kept * total + jnp.sum(weights, axis=(-2, -1))
            new = _dot("bngxey,bneyv->bngxv", weights.astype(v.dtype), _take(blocks.v, at))
            return new_highest, total, kept[..., None] * acc + new

        shape = queries.shape[:2] + queries.shape[3:-1]
        start = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, v.shape[-1]))
        highest, total, acc = jax.lax.fori_loop(0, lists.turns(i), attend, start)
        safe = jnp.where(total == 0, 1, total)
        return (acc / safe[..., None]).astype(v.dtype), jnp.where(total == 0, -jnp.inf, highest + jnp.log(safe))

    o, lse = jax.lax.map(row, jnp.arange(queries.shape[2]))
    return _join_query_blocks(o), _join_query_blocks(lse)


def backward(
    settings: Settings, q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles,
    lse: jax.Array, delta: jax.Array, do: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v; delta = sum(o do) - dlse over the values, float32 [b, h, T]."""
    blocks = _Blocks.of(settings, k, v, tiles, q, do, lse, delta)
    lists = _Lists.of(*live_first(blocks.ids, blocks.kinds), settings.block_k)
    columns = _Lists.of(*transpose(blocks.ids, blocks.kinds, blocks.k.shape[2]), settings.block_q)

    def weights_and_d_scores(pairs, queries, key, do_pairs, value, lse, delta, do, allowed):
        scores, slope = _scores(settings, pairs, queries, key)
        # Queries that see nothing have lse = -inf, and all their pairs are forbidden.
        weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - lse, 0)), 0)
        d_scores = weights * (_dot(do_pairs, do, value) - delta) * slope
        return weights.astype(do.dtype), d_scores.astype(q.dtype)

    def dq_of_row(i):
        queries, do, lse, delta = (x[:, :, i] for x in blocks.of_queries)

        def add(turn, dq):
            at, is_live = lists.entries(i, turn)
            key, value = _take(blocks.k, at), _take(blocks.v, at)
            _, d_scores = weights_and_d_scores(
                "bngxk,bneyk->bngxey", queries, key, "bngxv,bneyv->bngxey", value,
                lse[..., None, None], delta[..., None, None], do,
                _allowed_in_row(settings, blocks, i, at, is_live))
            return dq + _dot("bngxey,bneyk->bngxk", d_scores, key)

        return jax.lax.fori_loop(0, lists.turns(i), add, jnp.zeros(queries.shape)).astype(q.dtype)

    def dkv_of_column(j):
        key, value = blocks.k[:, :, j], blocks.v[:, :, j]

        def add(turn, carry):
            at, is_live = columns.entries(j, turn)
            queries, do, lse, delta = (_take(x, at) for x in blocks.of_queries)
            weights, d_scores = weights_and_d_scores(
                "bnegxk,bnyk->bnegxy", queries, key, "bnegxv,bnyv->bnegxy", value,
                lse[..., None], delta[..., None], do, _allowed_in_column(settings, blocks, j, at, is_live))
            dk, dv = carry
            return (dk + _dot("bnegxy,bnegxk->bnyk", d_scores, queries),
                    dv + _dot("bnegxy,bnegxv->bnyv", weights, do))

        start = jnp.zeros(key.shape), jnp.zeros(value.shape)
        return jax.lax.fori_loop(0, columns.turns(j), add, start)

    dq = jax.lax.map(dq_of_row, jnp.arange(blocks.ids.shape[2]))
    dk, dv = jax.lax.map(dkv_of_column, jnp.arange(blocks.k.shape[2]))
    return _join_query_blocks(dq), _join_key_blocks(dk, k), _join_key_blocks(dv, v)


class _Lists(NamedTuple):
    """Lists in turns of e entries each: [b, n, i, turns, e]."""

    ids: jax.Array
    is_live: jax.Array
    needed: jax.Array  # [i] turns that the longest list needs

    @classmethod
    def of(cls, ids: jax.Array, kinds: jax.Array, block: int) -> "_Lists":
        per_turn = min(max(1, TOKENS_PER_TURN // block), ids.shape[-1])
        padding = ((0, 0), (0, 0), (0, 0), (0, -ids.shape[-1] % per_turn))
        ids, is_live = jnp.pad(ids, padding), jnp.pad(kinds != NOTHING, padding)
        count = jnp.max(jnp.sum(is_live, axis=-1, dtype=jnp.int32), axis=(0, 1))
        in_turns = (*ids.shape[:3], -1, per_turn)
        return cls(ids.reshape(in_turns), is_live.reshape(in_turns), -(-count // per_turn))

    def turns(self, block: jax.Array) -> jax.Array:
        return self.needed[block]

    def entries(self, block: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.ids[:, :, block, turn], self.is_live[:, :, block, turn]


class _Blocks(NamedTuple):
    """Arrays cut into blocks, with a copy of the keys for each head that has a list."""

    of_queries: tuple[jax.Array, ...]  # [b, n, i, g, x, ...] each
    k: jax.Array                       # [b, n, j, y, k]
    v: jax.Array                       # [b, n, j, y, v]
    q_rows: jax.Array                  # [b, i, 2, x]
    kv_rows: jax.Array                 # [b, n, j, 2, y]
    words: jax.Array | None            # [b, n, i, w, x]
    ids: jax.Array                     # [b, n, i, l]
    kinds: jax.Array                   # [b, n, i, l]

    @classmethod
    def of(cls, settings: Settings, k: jax.Array, v: jax.Array, tiles: Tiles, *of_queries: jax.Array) -> "_Blocks":
        batch, num_heads = of_queries[0].shape[:2]
        num_lists = max(k.shape[1], tiles.ids.shape[1])

        def query_blocks(x):
            x = x.reshape(batch, num_lists, num_heads // num_lists, -1, settings.block_q, *x.shape[3:])
            return jnp.moveaxis(x, 3, 2)

        def key_blocks(x):
            x = jnp.repeat(x, num_lists // x.shape[1], axis=1)
            return x.reshape(batch, num_lists, -1, settings.block_k, x.shape[-1])

        def token_blocks(rows, block):
            return rows.reshape(*rows.shape[:-1], -1, block).swapaxes(-3, -2)

        def per_list(x):
            return jnp.broadcast_to(x, (batch, num_lists, *x.shape[2:]))

        words = None if tiles.row_select is None else per_list(token_blocks(tiles.row_select, settings.block_q))
        return cls(
            tuple(map(query_blocks, of_queries)), key_blocks(k), key_blocks(v),
            token_blocks(tiles.q_rows, settings.block_q),
            per_list(token_blocks(tiles.kv_rows, settings.block_k)[:, None]),
            words, per_list(tiles.ids), per_list(tiles.kinds))


def _allowed_in_row(settings, blocks, i, at, is_live):
    """[b, n, 1, x, e, y]: pairs of the query block i and the key blocks `at` [b, n, e]."""
    q_rows, kv_rows = blocks.q_rows[:, None, i, :, :, None, None], _take(blocks.kv_rows, at)[:, :, None]
    allowed = may_attend(q_rows[:, :, 0], q_rows[:, :, 1], kv_rows[:, :, :, :, 0], kv_rows[:, :, :, :, 1],
                         causal=settings.causal, window=settings.window)
    if blocks.words is not None:
        words = jnp.take_along_axis(blocks.words[:, :, i], at[..., None] // 32, axis=2)  # [b, n, e, x]
        allowed &= is_selected(words, at[..., None]).swapaxes(-1, -2)[..., None]
    return (allowed & is_live[:, :, None, :, None])[:, :, None]


def _allowed_in_column(settings, blocks, j, at, is_live):
    """[b, n, e, 1, x, y]: pairs of the query blocks `at` [b, n, e] and the key block j."""
    q_rows = jnp.broadcast_to(blocks.q_rows[:, None], (*at.shape[:2], *blocks.q_rows.shape[1:]))
    q_rows = _take(q_rows, at)[..., None]
    kv_rows = blocks.kv_rows[:, :, None, j, :, None]
    allowed = may_attend(q_rows[:, :, :, 0], q_rows[:, :, :, 1], kv_rows[:, :, :, 0], kv_rows[:, :, :, 1],
                         causal=settings.causal, window=settings.window)
    if blocks.words is not None:
        allowed &= is_selected(_take(blocks.words[:, :, :, j // 32], at), j)[..., None]
    return (allowed & is_live[..., None, None])[:, :, :, None]


def _scores(
    settings: Settings, pairs: str, queries: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
    """Scores in float32, and their slope: the derivative by q . k."""
    scores = settings.scale * _dot(pairs, queries, keys)
    if settings.softcap is None:
        return scores, settings.scale
    bent = jnp.tanh(scores / settings.softcap)
    return settings.softcap * bent, settings.scale * (1 - bent**2)


def _dot(pairs: str, x: jax.Array, y: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(pairs, x, y, precision=precision, preferred_element_type=jnp.float32)


def _take(blocks: jax.Array, at: jax.Array) -> jax.Array:
    """[b, n, j, ...] and [b, n, e] -> [b, n, e, ...]."""
    return jax.vmap(jax.vmap(lambda of_list, ids: of_list[ids]))(blocks, at)


def _join_query_blocks(x: jax.Array) -> jax.Array:
    """[i, b, n, g, x, ...] -> [b, h, T, ...]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], *x.shape[5:])


def _join_key_blocks(x: jax.Array, like: jax.Array) -> jax.Array:
    """[j, b, n, y, ...] float32 -> [b, hk, S, ...] in the dtype of `like`, summed over heads that share keys."""
    x = jnp.moveaxis(x, 0, 2)
    return jnp.sum(x.reshape(like.shape[0], like.shape[1], -1, *like.shape[2:]), axis=2).astype(like.dtype)
