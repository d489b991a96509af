"""Dense attention in blocks of scores, for CPUs: a block without an allowed pair costs its mask alone.

All scores of a long prompt are more than the processor's cache holds, and half of them, or most where slots are
free, are masked. Statistics run along the keys as in FlashAttention-2 (arXiv 2307.08691, algorithm 1).
"""
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, typed
from layers.attention.attended import Attended
from layers.attention.mask import Mask, TokenInfo, pairs
from layers.attention.softcap import softcap

BLOCK = 256  # queries, and keys, of a block: 9 heads of it are 2.4 MB of scores


class _Softmax(NamedTuple):
    """A softmax over the keys so far, and what it weighs; g query heads of each key head, x queries."""

    highest: jax.Array  # [b, n, g, x]
    total: jax.Array    # [b, n, g, x]: the denominator, over exp(highest)
    o: jax.Array        # [b, n, g, x, v], not divided by it yet


@typed
def attend_blockwise(
    q: Float[Array, "b t h k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n v"], *, mask: Mask,
    q_tokens: TokenInfo, kv_tokens: TokenInfo, key_bias: Float[Array, "b n s"] | None = None, scale: float,
    cap: float | None = None, block: int = BLOCK,
) -> Attended:
    """Computes softmax(softcap(scale q k^T) + key_bias) v over allowed pairs, block by block.

    Matmuls run in the input dtype, the softmax in float32.
    """
    batch, length, num_heads, width = q.shape
    block_q, num_key_heads = min(block, length), k.shape[2]
    num_blocks = -(-length // block_q)
    padding = num_blocks * block_q - length
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    queries = q.reshape(batch, num_blocks, block_q, num_key_heads, -1, width).transpose(1, 0, 3, 4, 2, 5)
    tokens = jax.tree.map(partial(_in_blocks, num_blocks=num_blocks, padding=padding), q_tokens)
    keys = _Keys(k.swapaxes(1, 2), v.swapaxes(1, 2), kv_tokens, key_bias)

    def attend(block_of_queries):
        rows, tokens = block_of_queries
        return keys.attend(rows, tokens, mask=mask, scale=scale, cap=cap, size=min(block, k.shape[1]))

    o, lse = jax.lax.map(attend, (queries, tokens))  # [i, b, n, g, x, v], [i, b, n, g, x]
    o = o.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, num_heads, v.shape[-1])
    lse = lse.transpose(1, 2, 3, 0, 4).reshape(batch, num_heads, -1)
    return Attended(o[:, :length], lse[:, :, :length])


class _Keys(NamedTuple):
    """Keys and values of all blocks."""

    k: jax.Array  # [b, n, s, k]
    v: jax.Array  # [b, n, s, v]
    tokens: TokenInfo
    bias: jax.Array | None

    def attend(
        self, queries: jax.Array, tokens: TokenInfo, *, mask: Mask, scale: float, cap: float | None, size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Attends from a block of queries [b, n, g, x, k] to all keys, in blocks of `size`."""
        num_keys = self.k.shape[2]

        def turn(so_far: _Softmax, j: jax.Array) -> tuple[_Softmax, None]:
            # The last block ends with the keys, and leaves out those that the one before it had.
            start = jnp.minimum(j * size, num_keys - size)
            keys = self._block(start, size)
            is_new = start + jnp.arange(size) >= j * size
            allowed = pairs(mask, tokens, keys.tokens) & is_new  # [r, p, x, y]
            add = partial(_add, queries, keys, allowed[:, :, None], scale, cap)
            return jax.lax.cond(jnp.any(allowed), add, lambda same: same, so_far), None

        shape = queries.shape[:4]
        start = _Softmax(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, self.v.shape[-1])))
        end, _ = jax.lax.scan(turn, start, jnp.arange(-(-num_keys // size)))
        safe = jnp.where(end.total == 0, 1, end.total)
        lse = jnp.where(end.total == 0, -jnp.inf, end.highest + jnp.log(safe))
        return (end.o / safe[..., None]).astype(self.v.dtype), lse

    def _block(self, start: jax.Array, size: int) -> "_Keys":
        def cut(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, size, axis)

        return _Keys(cut(self.k, 2), cut(self.v, 2), jax.tree.map(partial(cut, axis=2), self.tokens),
                     None if self.bias is None else cut(self.bias, 2))


def _add(
    queries: jax.Array, keys: _Keys, allowed: jax.Array, scale: float, cap: float | None, so_far: _Softmax
) -> _Softmax:
    """Adds a block of keys to the softmax; `allowed` is [r, p, 1, x, y]."""
    rows = queries.reshape(*queries.shape[:2], -1, queries.shape[-1])  # those that share a key head, as one matmul
    scores = jnp.einsum("bnrk,bnyk->bnry", rows, keys.k, preferred_element_type=jnp.float32)
    scores, _ = softcap(scores.reshape(*queries.shape[:4], -1) * scale, cap)
    if keys.bias is not None:
        scores += keys.bias.astype(jnp.float32)[:, :, None, None]
    scores = jnp.where(allowed, scores, -jnp.inf)
    highest = jnp.maximum(so_far.highest, jax.lax.stop_gradient(jnp.max(scores, axis=-1)))
    shift = jnp.where(highest == -jnp.inf, 0, highest)  # of queries that have seen nothing
    weights, kept = jnp.exp(scores - shift[..., None]), jnp.exp(so_far.highest - shift)
    total = kept * so_far.total + jnp.sum(weights, axis=-1)
    new = jnp.einsum("bnry,bnyv->bnrv", weights.reshape(*rows.shape[:3], -1).astype(keys.v.dtype), keys.v,
                     preferred_element_type=jnp.float32)
    return _Softmax(highest, total, kept[..., None] * so_far.o + new.reshape(so_far.o.shape))


def _in_blocks(x: Array, *, num_blocks: int, padding: int) -> jax.Array:
    """[r, p, t] -> [i, r, p, x]; what is appended is padding, segment 0."""
    x = jnp.pad(jnp.asarray(x), ((0, 0), (0, 0), (0, padding)))
    return jnp.moveaxis(x.reshape(*x.shape[:2], num_blocks, -1), 2, 0)
