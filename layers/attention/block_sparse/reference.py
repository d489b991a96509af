"""Block-sparse attention as its definition says: all scores, a mask, a softmax."""
import jax
import jax.numpy as jnp

from layers.attention.block_lists import BlockLists
from layers.attention.mask_spec import SELECT_BITS, MaskSpec, is_selected, may_attend, token_rows


def attention_reference(
    q: jax.Array, k: jax.Array, v: jax.Array, blocks: BlockLists, mask: MaskSpec
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale q k^T + mask) v, [b, t, h, v] in v's dtype, and its log-sum-exp, [b, h, t] float32."""
    num_groups = q.shape[2] // k.shape[2]
    exact = jax.lax.Precision.HIGHEST
    dtype = v.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, num_groups, axis=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if mask.scale is None else mask.scale
    scores = scale * jnp.einsum("bthk,bshk->bhts", q, k, precision=exact)
    if mask.softcap is not None:
        scores = mask.softcap * jnp.tanh(scores / mask.softcap)

    allowed = dense_mask(blocks, mask, q.shape[2], q.shape[1], k.shape[1])
    sees_any = jnp.any(allowed, axis=-1)
    # A row that sees nothing gets finite scores first, then no weight: -inf - -inf would be NaN in the gradient.
    highest = jax.lax.stop_gradient(jnp.max(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min), axis=-1))
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - highest[..., None], 0)), 0)
    total = jnp.where(sees_any, jnp.sum(weights, axis=-1), 1)
    o = jnp.einsum("bhts,bshv->bthv", weights / total[..., None], v, precision=exact)
    return o.astype(dtype), jnp.where(sees_any, highest + jnp.log(total), -jnp.inf)


def dense_mask(
    blocks: BlockLists, mask: MaskSpec, num_heads: int, num_queries: int, num_keys: int
) -> jax.Array:
    """[b or 1, h, t, s] bool: whether a query may see a key."""
    rows = token_rows(mask, num_queries, num_keys)
    of_pair = may_attend(
        rows.of_queries[:, 0, :, None], rows.of_queries[:, 1, :, None],
        rows.of_keys[:, 0, None], rows.of_keys[:, 1, None], causal=mask.causal, window=mask.window)
    block_of_query = jnp.arange(num_queries) // blocks.block_q
    block_of_key = jnp.arange(num_keys) // blocks.block_k
    listed = blocks.to_dense()[:, :, block_of_query][..., block_of_key]  # [b, m, t, s]
    if mask.row_select is not None:
        words = mask.row_select[:, :, block_of_key // SELECT_BITS].swapaxes(-1, -2)  # [b, m, t, s]
        listed &= is_selected(words, block_of_key)
    return jnp.repeat(listed, num_heads // listed.shape[1], axis=1) & of_pair[:, None]
