"""Attention over listed blocks of keys: its checks, its gradient, and which implementation runs."""
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from layers.arrays.cost import with_flops
from layers.arrays.dispatch import by_platform, kernel_modules
from layers.attention.attended import Attended
from layers.attention.block_lists import BITS_PER_WORD, BlockLists
from layers.attention.block_sparse import xla
from layers.attention.block_sparse.reference import listed_pairs
from layers.attention.block_sparse.tiles import AttentionSettings, Sizes, Tiles, make_tiles
from layers.attention.bounds import pad_tokens
from layers.attention.dense import attend_reference
from layers.attention.mask import Mask, TokenInfo, pairs


def attend_to_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, blocks: BlockLists, *, mask: Mask, q_tokens: TokenInfo,
    kv_tokens: TokenInfo, key_bias: jax.Array | None, scale: float, softcap: float | None, implementation: str,
    interpret: Any,
) -> Attended:
    """Runs `attend` over listed blocks; arguments are those of `attend`, with tokens and scale filled in.

    Sums are float32. Gradients are exact for the given lists; the lists themselves get none. Entries that name no
    block are left out.
    """
    check_blocks(q, k, v, blocks)
    (batch, num_queries), num_keys = q.shape[:2], k.shape[1]
    if implementation == "reference":
        listed = listed_pairs(blocks.without_bad_entries(), num_queries, num_keys)
        listed = jnp.repeat(listed, q.shape[2] // listed.shape[1], axis=1)
        allowed = pairs(mask, q_tokens, kv_tokens)
        allowed = listed & jnp.repeat(allowed, q.shape[2] // allowed.shape[1], axis=1)
        return attend_reference(q, k, v, allowed, key_bias=key_bias, scale=scale, cap=softcap)
    settings = AttentionSettings(
        block_q=blocks.block_q, block_k=blocks.block_k, mask=mask, softcap=softcap, scale=scale,
        implementation=implementation, interpret=interpret)
    tiles = make_tiles(blocks, mask, q_tokens, kv_tokens, batch=batch)
    if key_bias is not None:
        key_bias = pad_tokens(key_bias.astype(jnp.float32), blocks.block_k, axis=2)
    o, lse = _attend(settings, pad_tokens(q, blocks.block_q, axis=1), pad_tokens(k, blocks.block_k, axis=1),
                     pad_tokens(v, blocks.block_k, axis=1), key_bias, tiles)
    return Attended(o[:, :num_queries], lse[:, :, :num_queries])


def check_blocks(q: jax.Array, k: jax.Array, v: jax.Array, blocks: BlockLists) -> None:
    """Raises ValueError where lists and arrays do not fit each other."""
    blocks.check()
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_key_heads = k.shape[1:3]
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or dtypes - {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must be float32, or all bfloat16")
    needed = (-(-num_queries // blocks.block_q), -(-num_keys // blocks.block_k))
    listed = (blocks.num_query_blocks, blocks.num_key_blocks)
    if needed != listed:
        raise ValueError(
            f"blocks lists {listed[0]} blocks of {blocks.block_q} queries and {listed[1]} of {blocks.block_k} "
            f"keys; {num_queries} queries and {num_keys} keys make {needed[0]} and {needed[1]}")
    rows, heads = blocks.ids.shape[:2]
    if rows not in (1, batch) or heads not in (1, num_key_heads, num_heads):
        raise ValueError(
            f"blocks has lists for {rows} rows and {heads} heads; rows may be 1 or {batch}, "
            f"heads 1, {num_key_heads} (key heads) or {num_heads} (query heads)")
    chosen = blocks.rows
    if chosen is not None:
        words = -(-blocks.num_key_blocks // BITS_PER_WORD)
        if chosen.ndim != 4 or chosen.shape[0] not in (1, batch) or chosen.shape[1] not in (1, heads) or (
                chosen.shape[2:] != (words, num_queries)):
            raise ValueError(f"blocks.rows has shape {list(chosen.shape)}; [{batch}, {heads}, {words}, "
                             f"{num_queries}] fits, or 1 in place of the first two")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: AttentionSettings, q: jax.Array, k: jax.Array, v: jax.Array, key_bias: jax.Array | None, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    return _over_any_batch("forward", settings)(q, k, v, key_bias, tiles)


def _attend_fwd(settings, q, k, v, key_bias, tiles):
    o, lse = _attend(settings, q, k, v, key_bias, tiles)
    o, lse = checkpoint_name(o, "block_sparse_attention"), checkpoint_name(lse, "block_sparse_attention")
    return (o, lse), (q, k, v, key_bias, tiles, o, lse)


def _attend_bwd(settings, residuals, cotangents):
    q, k, v, key_bias, tiles, o, lse = residuals
    do, dlse = cotangents
    # d score = weight (do . value - sum(o do) + dlse): the log-sum-exp pulls on every weight alike.
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1).swapaxes(1, 2) - dlse
    return *_over_any_batch("backward", settings)(q, k, v, key_bias, tiles, lse, delta, do), None


_attend.defvjp(_attend_fwd, _attend_bwd)


@functools.cache
def _over_any_batch(direction: str, settings: AttentionSettings):
    """Returns a pass that works under vmap: the mapped axis joins the rows, which kernels know how to handle."""

    @jax.custom_batching.custom_vmap
    def run(*arguments):
        flops = _count_flops(direction, settings, *arguments)
        call = with_flops(f"block_sparse_attention_{direction}", flops, _run, direction, settings)
        return call(*arguments)

    @run.def_vmap
    def run_mapped(axis_size, is_mapped, *arguments):
        q, q_is_mapped = arguments[0], is_mapped[0]
        batch = q.shape[1] if q_is_mapped else q.shape[0]

        def join(x, x_is_mapped):
            x = x if x_is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            x = jnp.broadcast_to(x, (axis_size, batch, *x.shape[2:]))
            return x.reshape(axis_size * batch, *x.shape[2:])

        results = run(*jax.tree.map(join, arguments, tuple(is_mapped)))
        split = jax.tree.map(lambda x: x.reshape(axis_size, batch, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, split)

    return run


def _run(direction: str, settings: AttentionSettings, q, k, v, key_bias, tiles: Tiles, *others):
    """Runs the implementation asked for; for "auto" that of the platform which the program is lowered for."""
    operands = (q, k, v, key_bias, tiles, *others)
    run_xla = functools.partial(getattr(xla, direction), settings)
    if settings.implementation == "xla":
        return run_xla(*operands)
    num_lists, num_query_blocks, list_length = tiles.ids.shape[1:]
    sizes = Sizes(
        num_query_blocks, k.shape[1] // settings.block_k, num_lists, list_length, q.dtype, q.shape[-1],
        v.shape[-1], has_key_bias=key_bias is not None,
        tokens_per_head=max(tiles.q_tokens.shape[1], tiles.kv_tokens.shape[1]) > 1)
    modules = kernel_modules("attention.block_sparse", settings.implementation)
    kernels = {platform: functools.partial(_run_kernel, getattr(module, direction), settings)
               for platform, module in modules.items()}
    reasons = {platform: module.unsupported(settings, sizes) for platform, module in modules.items()}
    return by_platform("block_sparse_attention", kernels | {"default": run_xla}, *operands, reasons=reasons,
                       fallback="xla", implementation=settings.implementation)


def _run_kernel(kernel, settings: AttentionSettings, q, k, v, key_bias, tiles: Tiles, *others):
    """Kernels read no key_bias; a call that has one is refused before."""
    results = kernel(settings, q, k, v, tiles, *others)
    return (*results, None) if others else results  # the gradient of key_bias


def _count_flops(direction: str, settings: AttentionSettings, q, k, v, key_bias, tiles: Tiles, *others) -> int:
    """Counts the matmuls of all tiles that the lists have room for."""
    batch, _, num_heads, width = q.shape
    num_query_blocks, list_length = tiles.ids.shape[2:]
    pairs_per_head = num_query_blocks * list_length * settings.block_q * settings.block_k
    value_width = v.shape[-1]
    # Forward: scores, output. Backward: both passes over the tiles make scores and d weights; then dq, dk and dv.
    widths = width + value_width if direction == "forward" else 4 * width + 3 * value_width
    return 2 * batch * num_heads * pairs_per_head * widths
