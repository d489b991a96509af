"""Block-sparse attention in plain XLA: loops over tiles with running softmax statistics, on any platform.

Scores exist for one block of queries and a few of keys at a time, and a loop ends with the longest list of the
rows and heads it serves: work follows the lists, not the room in them. Nothing of the size of q or k is copied;
results are written where they belong. FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2, over lists.

Letters: n heads that have a list of their own (key heads, or query heads if their lists differ), g query heads of
each, i and j blocks of queries and of keys, x and y tokens in one, e entries of a list read in one turn of a loop.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.attention.block_lists import BITS_PER_WORD, is_selected
from layers.attention.block_sparse.tiles import NOTHING, AttentionSettings, Tiles, as_tokens, transpose
from layers.attention.mask import may_attend
from layers.attention.softcap import softcap

TOKENS_PER_TURN = 512  # more make larger matmuls, and more work past the end of a list


def forward(
    settings: AttentionSettings, q: jax.Array, k: jax.Array, v: jax.Array, key_bias: jax.Array | None, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """Maps q [b, T, h, k], k [b, S, hk, k], v [b, S, hk, v] and key_bias [b, hk, S] to the output and its lse.

    The output is [b, T, h, v] in v's dtype, the lse [b, h, T] float32.
    """
    of_tiles = _OfTiles(settings, tiles, num_key_heads=k.shape[2])
    lists = of_tiles.rows()

    def row(i, results):
        queries = of_tiles.query_block(q, i)

        def attend(turn, carry):
            highest, total, acc = carry
            at, is_live = lists.entries(i, turn)
            bias = None if key_bias is None else of_tiles.take_key_bias(key_bias, at)[:, :, None, None]
            scores, _ = _scores(settings, "bxngk,bneyk->bngxey", queries, of_tiles.take_keys(k, at), bias)
            scores = jnp.where(of_tiles.allowed_in_row(i, at, is_live), scores, -jnp.inf)
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=(-2, -1)))
            shift = jnp.where(new_highest == -jnp.inf, 0, new_highest)
            weights = jnp.exp(scores - shift[..., None, None])
            kept = jnp.exp(highest - shift)
            total = kept * total + jnp.sum(weights, axis=(-2, -1))
            new = _dot("bngxey,bneyv->bngxv", weights.astype(v.dtype), of_tiles.take_keys(v, at))
            return new_highest, total, kept[..., None] * acc + new

        batch, x, n, g = queries.shape[:4]
        shape = (batch, n, g, x)
        start = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, width))
        highest, total, acc = jax.lax.fori_loop(0, lists.needed[i], attend, start)
        safe = jnp.where(total == 0, 1, total)
        o, lse = results
        o = _put(o, jnp.moveaxis(acc / safe[..., None], 3, 1), i * x, axis=1)
        return o, _put(lse, jnp.where(total == 0, -jnp.inf, highest + jnp.log(safe)), i * x, axis=2)

    width = v.shape[-1]
    results = jnp.zeros((*q.shape[:3], width), v.dtype), jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))
    return jax.lax.fori_loop(0, q.shape[1] // settings.block_q, row, results)


def backward(
    settings: AttentionSettings, q: jax.Array, k: jax.Array, v: jax.Array, key_bias: jax.Array | None,
    tiles: Tiles, lse: jax.Array, delta: jax.Array, do: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Computes gradients of q, k, v and key_bias; delta = sum(o do) - dlse over the values, float32 [b, h, T]."""
    of_tiles = _OfTiles(settings, tiles, num_key_heads=k.shape[2])
    rows, columns = of_tiles.rows(), of_tiles.columns(k.shape[1] // settings.block_k)

    def weights_and_d_logits(pairs, queries, key, bias, do_pairs, do, value, lse, delta, allowed):
        scores, slope = _scores(settings, pairs, queries, key, bias)
        # Queries that see nothing have lse = -inf, and all their pairs are forbidden.
        weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - lse, 0)), 0)
        return weights.astype(do.dtype), weights * (_dot(do_pairs, do, value) - delta), slope

    def dq_of_row(i, dq):
        queries, do_i = of_tiles.query_block(q, i), of_tiles.query_block(do, i)
        lse_i, delta_i = (of_tiles.statistics_block(x, i)[..., None, None] for x in (lse, delta))

        def add(turn, total):
            at, is_live = rows.entries(i, turn)
            key, value = of_tiles.take_keys(k, at), of_tiles.take_keys(v, at)
            bias = None if key_bias is None else of_tiles.take_key_bias(key_bias, at)[:, :, None, None]
            _, d_logits, slope = weights_and_d_logits(
                "bxngk,bneyk->bngxey", queries, key, bias, "bxngv,bneyv->bngxey", do_i, value, lse_i, delta_i,
                of_tiles.allowed_in_row(i, at, is_live))
            return total + _dot("bngxey,bneyk->bxngk", (d_logits * slope).astype(q.dtype), key)

        total = jax.lax.fori_loop(0, rows.needed[i], add, jnp.zeros(queries.shape))
        return _put(dq, total, i * settings.block_q, axis=1)

    def gradients_of_column(j, gradients):
        key, value = of_tiles.key_block(k, j), of_tiles.key_block(v, j)
        bias = None if key_bias is None else of_tiles.key_bias_block(key_bias, j)[:, :, None, None, None]

        def add(turn, totals):
            at, is_live = columns.entries(j, turn)
            queries, do_at = of_tiles.take_queries(q, at), of_tiles.take_queries(do, at)
            lse_at, delta_at = (of_tiles.take_statistics(x, at)[..., None] for x in (lse, delta))
            weights, d_logits, slope = weights_and_d_logits(
                "bnexgk,bynk->bnegxy", queries, key, bias, "bnexgv,bynv->bnegxy", do_at, value, lse_at, delta_at,
                of_tiles.allowed_in_column(j, at, is_live))
            news = [_dot("bnegxy,bnexgk->bynk", (d_logits * slope).astype(q.dtype), queries),
                    _dot("bnegxy,bnexgv->bynv", weights, do_at)]
            if key_bias is not None:
                news.append(jnp.sum(d_logits, axis=(2, 3, 4)).swapaxes(1, 2)[..., None])  # [b, y, n, 1]
            return [total + new for total, new in zip(totals, news, strict=True)]

        widths = [key.shape[-1], value.shape[-1]] + ([] if key_bias is None else [1])
        totals = jax.lax.fori_loop(
            0, columns.needed[j], add, [jnp.zeros((*key.shape[:3], width)) for width in widths])
        # Lists of query heads that share keys each have their part of the gradient.
        totals = [x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3]).sum(axis=3) for x in totals]
        return [_put(gradient, total, j * settings.block_k, axis=1)
                for gradient, total in zip(gradients, totals, strict=True)]

    dq = jax.lax.fori_loop(0, q.shape[1] // settings.block_q, dq_of_row, jnp.zeros_like(q))
    gradients = [jnp.zeros_like(k), jnp.zeros_like(v)]
    if key_bias is not None:
        gradients.append(jnp.zeros((*k.shape[:3], 1)))
    dk, dv, *d_bias = jax.lax.fori_loop(0, k.shape[1] // settings.block_k, gradients_of_column, gradients)
    return dq, dk, dv, d_bias[0][..., 0].swapaxes(1, 2).astype(key_bias.dtype) if d_bias else None


class _Lists(NamedTuple):
    """Lists in turns of e entries each: [b, n, blocks, turns, e]."""

    ids: jax.Array
    is_live: jax.Array
    needed: jax.Array  # [blocks] turns that the longest list needs

    @classmethod
    def of(cls, ids: jax.Array, kinds: jax.Array, block: int) -> "_Lists":
        per_turn = min(max(1, TOKENS_PER_TURN // block), ids.shape[-1])
        padding = ((0, 0), (0, 0), (0, 0), (0, -ids.shape[-1] % per_turn))
        ids, is_live = jnp.pad(ids, padding), jnp.pad(kinds != NOTHING, padding)
        count = jnp.max(jnp.sum(is_live, axis=-1, dtype=jnp.int32), axis=(0, 1))
        in_turns = (*ids.shape[:3], -1, per_turn)
        return cls(ids.reshape(in_turns), is_live.reshape(in_turns), -(-count // per_turn))

    def entries(self, block: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.ids[:, :, block, turn], self.is_live[:, :, block, turn]


class _OfTiles:
    """Cuts out of whole arrays what some tiles need, and says which of their pairs are allowed."""

    def __init__(self, settings: AttentionSettings, tiles: Tiles, *, num_key_heads: int) -> None:
        self.settings, self.tiles = settings, tiles
        self.batch, self.num_lists = tiles.q_tokens.shape[0], max(num_key_heads, tiles.ids.shape[1])

        def per_list(x):
            return jnp.broadcast_to(x, (self.batch, self.num_lists, *x.shape[2:]))

        self.ids, self.kinds = per_list(tiles.ids), per_list(tiles.kinds)
        self.words = None if tiles.rows is None else per_list(tiles.rows)  # [b, n, w, T]

    def rows(self) -> _Lists:
        return _Lists.of(self.ids, self.kinds, self.settings.block_k)

    def columns(self, num_key_blocks: int) -> _Lists:
        return _Lists.of(*transpose(self.ids, self.kinds, num_key_blocks), self.settings.block_q)

    def query_block(self, x: jax.Array, i: jax.Array) -> jax.Array:
        """[b, T, h, k] -> [b, x, n, g, k]."""
        block = jax.lax.dynamic_slice_in_dim(x, i * self.settings.block_q, self.settings.block_q, axis=1)
        return block.reshape(*block.shape[:2], self.num_lists, -1, x.shape[-1])

    def statistics_block(self, x: jax.Array, i: jax.Array) -> jax.Array:
        """[b, h, T] -> [b, n, g, x]."""
        block = jax.lax.dynamic_slice_in_dim(x, i * self.settings.block_q, self.settings.block_q, axis=2)
        return block.reshape(self.batch, self.num_lists, -1, self.settings.block_q)

    def key_block(self, x: jax.Array, j: jax.Array) -> jax.Array:
        """[b, S, hk, k] -> [b, y, n, k]."""
        block = jax.lax.dynamic_slice_in_dim(x, j * self.settings.block_k, self.settings.block_k, axis=1)
        return jnp.repeat(block, self.num_lists // x.shape[2], axis=2)

    def take_keys(self, x: jax.Array, at: jax.Array) -> jax.Array:
        """[b, S, hk, k] and blocks [b, n, e] -> [b, n, e, y, k]."""
        blocks = x.reshape(x.shape[0], -1, self.settings.block_k, *x.shape[2:])
        head = jnp.arange(self.num_lists) // (self.num_lists // x.shape[2])
        return blocks[self._row, at, :, head[:, None]]

    def take_queries(self, x: jax.Array, at: jax.Array) -> jax.Array:
        """[b, T, h, k] and blocks [b, n, e] -> [b, n, e, x, g, k]."""
        per_list = (self.num_lists, x.shape[2] // self.num_lists)
        blocks = x.reshape(x.shape[0], -1, self.settings.block_q, *per_list, x.shape[3])
        return blocks[self._row, at, :, self._list]

    def take_statistics(self, x: jax.Array, at: jax.Array) -> jax.Array:
        """[b, h, T] and blocks [b, n, e] -> [b, n, e, g, x]."""
        blocks = x.reshape(x.shape[0], self.num_lists, x.shape[1] // self.num_lists, -1, self.settings.block_q)
        return blocks[self._row, self._list, :, at]

    def key_bias_block(self, x: jax.Array, j: jax.Array) -> jax.Array:
        """[b, hk, S] -> [b, n, y]."""
        block = jax.lax.dynamic_slice_in_dim(x, j * self.settings.block_k, self.settings.block_k, axis=2)
        return jnp.repeat(block, self.num_lists // x.shape[1], axis=1)

    def take_key_bias(self, x: jax.Array, at: jax.Array) -> jax.Array:
        """[b, hk, S] and blocks [b, n, e] -> [b, n, e, y]."""
        blocks = x.reshape(*x.shape[:2], -1, self.settings.block_k)
        return blocks[self._row, self._list // (self.num_lists // x.shape[1]), at]

    def allowed_in_row(self, i: jax.Array, at: jax.Array, is_live: jax.Array) -> jax.Array:
        """[b, n, 1, x, e, y]: pairs of the query block i and the key blocks `at` [b, n, e]."""
        q = self._token_block(self.tiles.q_tokens, self.settings.block_q, i)[..., None, None]
        kv = self._take_tokens(self.tiles.kv_tokens, self.settings.block_k, at)[:, :, :, None]
        allowed = may_attend(self.settings.mask, as_tokens(q, 0), as_tokens(kv, 0))  # [b, n, x, e, y]
        if self.words is not None:
            words = jax.lax.dynamic_slice_in_dim(
                self.words, i * self.settings.block_q, self.settings.block_q, axis=3)
            words = jnp.take_along_axis(words, at[..., None] // BITS_PER_WORD, axis=2)  # [b, n, e, x]
            allowed &= is_selected(words, at[..., None]).swapaxes(-1, -2)[..., None]
        return (allowed & is_live[:, :, None, :, None])[:, :, None]

    def allowed_in_column(self, j: jax.Array, at: jax.Array, is_live: jax.Array) -> jax.Array:
        """[b, n, e, 1, x, y]: pairs of the query blocks `at` [b, n, e] and the key block j."""
        q = self._take_tokens(self.tiles.q_tokens, self.settings.block_q, at)[..., None]
        kv = self._token_block(self.tiles.kv_tokens, self.settings.block_k, j)[..., None, None, :]
        allowed = may_attend(self.settings.mask, as_tokens(q, 0), as_tokens(kv, 0))  # [b, n, e, x, y]
        if self.words is not None:
            words = self.words[:, :, j // BITS_PER_WORD]
            words = words.reshape(*words.shape[:2], -1, self.settings.block_q)[self._row, self._list, at]
            allowed &= is_selected(words, j)[..., None]
        return (allowed & is_live[..., None, None])[:, :, :, None]

    @property
    def _row(self) -> jax.Array:
        return jnp.arange(self.batch)[:, None, None]

    @property
    def _list(self) -> jax.Array:
        return jnp.arange(self.num_lists)[:, None]

    def _token_block(self, fields: jax.Array, block: int, index: jax.Array) -> jax.Array:
        """[b, p, f, T] -> [f, b, n or 1, block]."""
        tokens = jax.lax.dynamic_slice_in_dim(fields, index * block, block, axis=3)
        if fields.shape[1] > 1:
            tokens = jnp.repeat(tokens, self.num_lists // fields.shape[1], axis=1)
        return jnp.moveaxis(tokens, 2, 0)

    def _take_tokens(self, fields: jax.Array, block: int, at: jax.Array) -> jax.Array:
        """[b, p, f, T] and blocks [b, n, e] -> [f, b, n, e, block]."""
        blocks = fields.reshape(*fields.shape[:3], -1, block)
        head = self._list // (self.num_lists // fields.shape[1]) if fields.shape[1] > 1 else 0
        return jnp.moveaxis(blocks[self._row, head, :, at], 3, 0)


def _put(whole: jax.Array, block: jax.Array, start: jax.Array, *, axis: int) -> jax.Array:
    """Writes `block`, whose lists and heads are apart, into `whole` from `start` on."""
    block = block.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 1 :]).astype(whole.dtype)
    return jax.lax.dynamic_update_slice_in_dim(whole, block, start, axis)


def _scores(
    settings: AttentionSettings, pairs: str, queries: jax.Array, keys: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array | float]:
    """Computes logits in float32, and their slope: the derivative by q . k."""
    scores, slope = softcap(settings.scale * _dot(pairs, queries, keys), settings.softcap)
    return scores if bias is None else scores + bias, settings.scale * slope


def _dot(pairs: str, x: jax.Array, y: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(pairs, x, y, precision=precision, preferred_element_type=jnp.float32)
