"""Log-linear attention: a decaying matrix state for each of log T blocks of the past, weighted by each token.

  o_i = sum_{j <= i} scale_i[level(i, j)] exp(g_{j+1} + ... + g_i) (q_i . k_j) v_j

level(i, j) is the number of bits up to the highest in which the positions i and j differ: 0 for the token itself,
and l > 0 where j is in the first half and i in the second half of one aligned block of 2^l tokens. The past of
each token falls into blocks that grow with their distance, those of a Fenwick tree (arXiv 2506.04761, section 3).

The fast form climbs this ladder. Levels within a chunk are one masked product. Above, the whole of a first half is
one state, decayed to the middle of its block; each token of the second half reads it, decayed from the
middle to the token; the states of both halves make that of the block. Each exponent is a sum of log decays of
tokens in a row, never a difference.
"""
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from layers.array_types import Array, Float, Int, typed
from layers.arrays.exact import exact_einsum
from layers.arrays.segments import segment_ordinals, segment_positions, segment_starts
from layers.recurrences.log_decay import NOTHING_LEFT

LogLinearImplementation = Literal["auto", "reference", "ladder"]
CHUNK_SIZE = 32       # tokens, a power of 2


@typed
def log_linear_attention(
    q: Float[Array, "b t n k"],
    k: Float[Array, "b t n k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, "b t h"],
    level_scales: Float[Array, "b t h levels"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: LogLinearImplementation = "auto",
) -> Float[Array, "b t h v"]:
    """Returns every o_t, in the dtype of v; sums are float32.

    Args:
      q, k: value head i uses head i // (h / n).
      log_decay: natural log of the decay, <= 0.
      level_scales: weights of the levels, from the token itself outwards; t tokens have ceil(log2 t) + 1 of them.
      segment_ids: 0 is padding, whose o is 0. Levels count from the start of each segment.
      implementation: "reference" is the sum above, over all pairs of tokens; "ladder" takes a state per chunk and
        time t log t, for twice the tokens where there are segments; "auto" is "ladder".
    Raises:
      ValueError: there are fewer levels than the tokens have, or the heads of q and k do not divide those of v.
    """
    length, num_heads, num_levels = *v.shape[1:3], num_levels_of(v.shape[1])
    if level_scales.shape[3] < num_levels:
        raise ValueError(f"level_scales has {level_scales.shape[3]} levels, but {length} tokens have {num_levels}")
    if num_heads % q.shape[2]:
        raise ValueError(f"q and k have {q.shape[2]} heads, which must divide the {num_heads} of v; arrays are "
                         "time first, [b, t, heads, width]")
    place = None
    if segment_ids is not None:
        is_real, starts = (segment_ids != 0)[..., None], segment_starts(segment_ids)[..., None]
        q, k = (jnp.where(is_real[..., None], x, 0) for x in (q, k))
        log_decay = jnp.where(starts, NOTHING_LEFT, jnp.where(is_real, log_decay, 0))
        place = _aligned_places(segment_ids)
    arrays = [x.astype(jnp.float32) for x in (q, k, v, log_decay, level_scales[..., :num_levels])]
    if implementation == "reference":
        position = jnp.arange(length)[None] if segment_ids is None else segment_positions(segment_ids)
        return all_pairs(*arrays, position).astype(v.dtype)
    if place is None:
        return ladder(*arrays).astype(v.dtype)
    rows = jnp.arange(v.shape[0])[:, None]
    moved = [jnp.zeros((x.shape[0], 2 * length, *x.shape[2:])).at[rows, place].set(x, mode="drop") for x in arrays]
    o = ladder(*moved).at[rows, place].get(mode="fill", fill_value=0)
    return o.astype(v.dtype)


def num_levels_of(length: int) -> int:
    """ceil(log2 length) + 1."""
    return (length - 1).bit_length() + 1


def all_pairs(q, k, v, log_decay, level_scales, position) -> jax.Array:
    """Computes the sum as it is written, over [b, h, i, j]."""
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    level = _bit_length(position[:, :, None] ^ position[:, None])  # [b, i, j]
    # Between segments a level may be one that no token has; the decay there is 0.
    level = jnp.minimum(level, level_scales.shape[3] - 1)[:, None]
    scale = jnp.take_along_axis(jnp.swapaxes(level_scales, 1, 2), level, axis=3)
    decay = _decays(jnp.swapaxes(log_decay, 1, 2))
    weights = scale * decay * exact_einsum("bihk,bjhk->bhij", q, k)
    return exact_einsum("bhij,bjhv->bihv", weights, v)


def ladder(q, k, v, log_decay, level_scales) -> jax.Array:
    """Computes the sum by chunks, and then by states of blocks of doubled size."""
    length, num_key_heads = v.shape[1], q.shape[2]
    size = min(CHUNK_SIZE, 1 << (length - 1).bit_length())
    num_chunks = 1 << (-(-length // size) - 1).bit_length()

    def heads_first(x):  # [b, t, h, ...] -> [b, n, r, t, ...]; zeros are inert
        x = jnp.pad(x, ((0, 0), (0, num_chunks * size - length), *((0, 0),) * (x.ndim - 2)))
        return rearrange(x, "b t (n r) ... -> b n r t ...", n=num_key_heads)

    q, k, v, log_decay, level_scales = (heads_first(x) for x in (q, k, v, log_decay, level_scales))
    q, k = q[:, :, 0], k[:, :, 0]  # [b, n, t, k]
    num_local = num_levels_of(size)
    o, state, from_start = jax.checkpoint(partial(_within_chunks, size), prevent_cse=False)(
        q, k, v, log_decay, level_scales[..., :num_local])
    for level in range(num_local, level_scales.shape[-1]):
        read, state, from_start = jax.checkpoint(_from_first_halves, prevent_cse=False)(
            q, level_scales[..., level], state, from_start)
        o = o + read
    return rearrange(o, "b n r t v -> b t (n r) v")[:, :length]


def _within_chunks(size, q, k, v, log_decay, level_scales):
    """Returns o within chunks, the state that each leaves, and sums of log decays from its start to each token."""
    def chunks(x, axis):
        return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])

    q, k, v, log_decay, level_scales = (
        chunks(x, axis) for x, axis in ((q, 2), (k, 2), (v, 3), (log_decay, 3), (level_scales, 3)))
    is_level = jax.nn.one_hot(_bit_length(np.arange(size)[:, None] ^ np.arange(size)), level_scales.shape[-1])
    decay = _decays(log_decay)  # [b, n, r, c, i, j]
    scale = exact_einsum("bnrcil,ijl->bnrcij", level_scales, is_level)
    pairs = exact_einsum("bncik,bncjk->bncij", q, k)[:, :, None]
    o = exact_einsum("bnrcij,bnrcjv->bnrciv", scale * decay * pairs, v)
    state = exact_einsum("bncjk,bnrcjv->bnrckv", k, decay[..., -1, :, None] * v)
    from_start = jnp.cumsum(log_decay, axis=-1)
    return o.reshape(*o.shape[:3], -1, o.shape[-1]), state, from_start.reshape(*from_start.shape[:3], -1)


def _from_first_halves(q, scale, state, from_start):
    """Reads the first halves of pairs of blocks from the second; returns o, and the states and sums of the pairs.

    Args:
      scale: [b, n, r, t], weights of this level.
      state: [b, n, r, c, k, v], of each block c.
      from_start: [b, n, r, t], sums of log decays from the start of each token's block to the token.
    """
    size = from_start.shape[3] // state.shape[3]

    halves = partial(rearrange, two=2, i=size)
    late_q = halves(q, "b n (c two i) k -> two b n c i k")[1]
    late_scale = halves(scale, "b n r (c two i) -> two b n r c i")[1]
    early_sum, late_sum = halves(from_start, "b n r (c two i) -> two b n r c i")
    early_state, late_state = rearrange(state, "b n r (c two) k v -> two b n r c k v", two=2)

    weight = late_scale * jnp.exp(late_sum)
    read = weight[..., None] * exact_einsum("bncik,bnrckv->bnrciv", late_q, early_state)
    read = rearrange(jnp.stack([jnp.zeros_like(read), read]), "two b n r c i v -> b n r (c two i) v")
    state = jnp.exp(late_sum[..., -1, None, None]) * early_state + late_state
    from_start = jnp.stack([early_sum, early_sum[..., -1:] + late_sum])
    return read, state, rearrange(from_start, "two b n r c i -> b n r (c two i)")


def _decays(log_decay: jax.Array) -> jax.Array:
    """Returns [..., i, j], the share of token j that is left at token i, from [..., t]; 0 for j > i."""
    length = log_decay.shape[-1]
    after = jnp.tril(jnp.ones((length, length), bool), -1)  # [l, j]
    between = jnp.cumsum(jnp.where(after, log_decay[..., None], 0), axis=-2)  # over j < l <= i, each by itself
    # Masked before the exponential, which would overflow for other pairs.
    return jnp.exp(jnp.where(jnp.tril(jnp.ones_like(after)), between, NOTHING_LEFT))


def _aligned_places(segment_ids: jax.Array) -> jax.Array:
    """Places each token, [b, t], in a row of 2 t so that all segments begin at multiples of powers of 2.

    A segment takes the next power of 2 of its length, and the largest come first: each thus begins at a multiple
    of its own, and places differ in the same bits as positions in the segment. Padding has no place.
    """
    length = segment_ids.shape[1]

    def of_row(ids, ordinals, position):
        sizes = jnp.zeros(length, jnp.int32).at[ordinals - 1].max(jnp.where(ids != 0, position + 1, 0))
        sizes = jnp.where(sizes > 0, 1 << _bit_length(sizes - 1), 0)
        order = jnp.argsort(-sizes)
        first = jnp.zeros(length, jnp.int32).at[order].set(jnp.cumsum(sizes[order]) - sizes[order])
        return jnp.where(ids != 0, first[ordinals - 1] + position, 2 * length)

    return jax.vmap(of_row)(segment_ids, segment_ordinals(segment_ids), segment_positions(segment_ids))


def _bit_length(x: jax.Array) -> jax.Array:
    """Counts the bits of the binary number x >= 0; 0 for 0."""
    return 32 - jax.lax.clz(jnp.asarray(x, jnp.int32))
