"""Attention over listed blocks of keys: the public function, its gradient, and which implementation runs."""
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from layers.array_types import Array, Float, typed
from layers.arrays.dispatch import by_platform, kernel_modules
from layers.attention.block_lists import BlockLists
from layers.attention.block_sparse import xla
from layers.attention.block_sparse.reference import attention_reference
from layers.attention.block_sparse.tiles import Settings, Sizes, Tiles, make_tiles
from layers.attention.mask_spec import SELECT_BITS, MaskSpec, add_sinks, pad_tokens

BlockSparseImplementation = Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu"]
CAUSAL = MaskSpec()


@typed
def block_sparse_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n v"],
    blocks: BlockLists,
    *,
    mask: MaskSpec = CAUSAL,
    implementation: BlockSparseImplementation = "auto",
    return_lse: bool = False,
    interpret: Any = False,
    debug: bool = False,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """Returns softmax(scale q k^T) v over the keys in the listed blocks that `mask` lets each query see.

    Softmax, its statistics and all sums are float32; the output has the dtype of `v`. The gradient is exact for
    the lists as given, and theirs is none. A query that sees nothing gets 0, an lse of -inf, and no gradient.

    Args:
      q: h query heads; each of the n key heads serves h / n of them that follow each other.
      blocks: for every block of queries, the blocks of keys to read; see `BlockLists`. Traced values may change
        from call to call without compiling again. Entries that name no block are left out;
        `BlockLists.from_ids` counts them in `overflow`.
      implementation: "reference" computes all scores; "xla" runs anywhere in memory that does not grow with t * s;
        "pallas_tpu" and "pallas_gpu" (Hopper, bfloat16) are kernels; "auto" is the kernel of the platform that
        the program is compiled for, and "xla" where there is none or it lacks this case, which is logged once.
      return_lse: also return the log of each softmax's denominator, float32, with a gradient of its own: two
        results over disjoint keys merge exactly, see `merge_by_lse`.
      interpret: for the kernels, True or parameters of one of Pallas's interpreters: run on any machine, slowly.
      debug: check traced lists on the host before the kernel reads them, and fail if one is wrong.
    Raises:
      ValueError: heads, lengths or blocks do not fit each other, or lists known now are wrong.
      NotImplementedError: the implementation asked for lacks this case; the message says why.
    """
    settings = _settings(q, k, v, blocks, mask, implementation, interpret)
    if debug:
        jax.debug.callback(_fail_on_bad_lists, blocks)
    if implementation == "reference":
        o, lse = attention_reference(q, k, v, blocks.without_bad_entries(), mask)
    else:
        tiles = make_tiles(blocks, mask, q.shape[0], q.shape[1], k.shape[1])
        whole_blocks = [pad_tokens(x, block, axis=1)
                        for x, block in ((q, blocks.block_q), (k, blocks.block_k), (v, blocks.block_k))]
        o, lse = _attend(settings, *whole_blocks, tiles)
        o, lse = o[:, : q.shape[1]], lse[:, :, : q.shape[1]]
    if mask.sinks is not None:
        o, lse = add_sinks(o, lse, mask.sinks)
    return (o, lse) if return_lse else o


@typed
def merge_by_lse(
    outputs: list[Float[Array, "b t h v"]], lses: list[Float[Array, "b h t"]]
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """Attention over the union of disjoint sets of keys, from the outputs and lses over each."""
    total = functools.reduce(jnp.logaddexp, lses)
    safe = jnp.where(total == -jnp.inf, 0, total)
    shares = [jnp.exp(lse - safe).swapaxes(1, 2)[..., None] for lse in lses]
    merged = sum(share * o.astype(jnp.float32) for share, o in zip(shares, outputs, strict=True))
    return merged.astype(outputs[0].dtype), total


def sharded_block_sparse_attention(
    mesh: Mesh, q: jax.Array, k: jax.Array, v: jax.Array, blocks: BlockLists,
    *, batch_axis: str | None = "data", head_axis: str | None = "model", **keywords: Any,
) -> Any:
    """`block_sparse_attention` with rows and heads spread over a mesh, whose devices work each on its own.

    The compiler cannot split a kernel by itself. Lists, and arrays of the mask, are split with their rows and
    heads; what there is one of serves all.

    Args:
      batch_axis, head_axis: axes of `mesh`; None keeps rows, or heads, whole.
    """
    mask = keywords.pop("mask", CAUSAL)
    rows = {1: None, q.shape[0]: batch_axis}
    heads = {1: None, k.shape[2]: head_axis, q.shape[2]: head_axis}

    def of_lists(x):
        return PartitionSpec(rows[x.shape[0]], heads[x.shape[1]])

    def of_mask(path, x):
        name = path[0].name
        if name == "row_select":
            return of_lists(x)
        if name == "sinks":
            return PartitionSpec(head_axis)
        return PartitionSpec(rows[x.shape[0]]) if jnp.ndim(x) else PartitionSpec()

    tokens = PartitionSpec(batch_axis, None, head_axis)
    lse = PartitionSpec(batch_axis, head_axis)
    in_specs = (
        tokens, tokens, tokens, jax.tree.map(of_lists, blocks), jax.tree_util.tree_map_with_path(of_mask, mask))
    return jax.shard_map(
        lambda q, k, v, blocks, mask: block_sparse_attention(q, k, v, blocks, mask=mask, **keywords),
        mesh=mesh, in_specs=in_specs, out_specs=(tokens, lse) if keywords.get("return_lse") else tokens,
        check_vma=False,  # kernels do not say which mesh axes their outputs vary over
    )(q, k, v, blocks, mask)


def _settings(q, k, v, blocks, mask, implementation, interpret) -> Settings:
    """Checks how the arguments fit each other."""
    mask.check()
    blocks.check()
    batch, num_queries, num_heads, width = q.shape
    num_keys, num_key_heads = k.shape[1:3]
    if num_heads % num_key_heads:
        raise ValueError(f"q has {num_heads} heads, no multiple of the {num_key_heads} of k and v")
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or dtypes - {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must be float32, or all bfloat16")
    there = (-(-num_queries // blocks.block_q), -(-num_keys // blocks.block_k))
    listed = (blocks.num_query_blocks, blocks.num_key_blocks)
    if there != listed:
        raise ValueError(
            f"blocks lists {listed[0]} blocks of {blocks.block_q} queries and {listed[1]} of {blocks.block_k} "
            f"keys; {num_queries} queries and {num_keys} keys make {there[0]} and {there[1]}")
    rows, heads = blocks.ids.shape[:2]
    if rows not in (1, batch) or heads not in (1, num_key_heads, num_heads):
        raise ValueError(
            f"blocks has lists for {rows} rows and {heads} heads; rows may be 1 or {batch}, "
            f"heads 1, {num_key_heads} (key heads) or {num_heads} (query heads)")
    select = mask.row_select
    if select is not None:
        words = -(-blocks.num_key_blocks // SELECT_BITS)
        if select.ndim != 4 or select.shape[0] not in (1, batch) or select.shape[1] not in (1, heads) or (
                select.shape[2:] != (words, num_queries)):
            raise ValueError(f"mask.row_select has shape {list(select.shape)}; [{batch}, {heads}, {words}, "
                             f"{num_queries}] fits, or 1 in the place of the first two")
    if mask.sinks is not None and mask.sinks.shape != (num_heads,):
        raise ValueError(f"mask.sinks has shape {list(mask.sinks.shape)}; one per query head, [{num_heads}], fits")
    return Settings(
        block_q=blocks.block_q, block_k=blocks.block_k, causal=mask.causal, window=mask.window,
        softcap=mask.softcap, scale=width ** -0.5 if mask.scale is None else mask.scale,
        implementation=implementation, interpret=interpret)


def _fail_on_bad_lists(blocks: BlockLists) -> None:
    problem = blocks.problem()
    if problem is not None:
        raise ValueError(f"BlockLists: {problem}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings, q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    return _over_any_batch(_forward, settings)(q, k, v, tiles)


def _attend_fwd(settings, q, k, v, tiles):
    o, lse = _attend(settings, q, k, v, tiles)
    o, lse = checkpoint_name(o, "block_sparse_attention"), checkpoint_name(lse, "block_sparse_attention")
    return (o, lse), (q, k, v, tiles, o, lse)


def _attend_bwd(settings, residuals, cotangents):
    q, k, v, tiles, o, lse = residuals
    do, dlse = cotangents
    # d score = weight (do . value - sum(o do) + dlse): the log-sum-exp pulls on every weight alike.
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1).swapaxes(1, 2) - dlse
    return *_over_any_batch(_backward, settings)(q, k, v, tiles, lse, delta, do), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(settings, *arrays):
    return _run("forward", settings, *arrays)


def _backward(settings, *arrays):
    return _run("backward", settings, *arrays)


def _run(direction: str, settings: Settings, q, k, v, tiles, *others):
    """The implementation asked for; for "auto" that of the platform which the program is lowered for."""
    operands = (q, k, v, tiles, *others)
    run_xla = functools.partial(getattr(xla, direction), settings)
    if settings.implementation == "xla":
        return run_xla(*operands)
    num_lists, num_query_blocks, room = tiles.ids.shape[1:]
    num_key_blocks = k.shape[1] // settings.block_k
    sizes = Sizes(num_query_blocks, num_key_blocks, num_lists, room, q.dtype, q.shape[-1], v.shape[-1])
    modules = kernel_modules("attention.block_sparse", settings.implementation)
    kernels = {platform: functools.partial(getattr(module, direction), settings)
               for platform, module in modules.items()}
    reasons = {platform: module.unsupported(settings, sizes) for platform, module in modules.items()}
    return by_platform("block_sparse_attention", kernels | {"default": run_xla}, *operands, reasons=reasons,
                       fallback="xla", implementation=settings.implementation)


@functools.cache
def _over_any_batch(function, settings: Settings):
    """`function` under vmap: the mapped axis joins the rows, which kernels know how to handle."""

    @jax.custom_batching.custom_vmap
    def run(*arguments):
        return function(settings, *arguments)

    @run.def_vmap
    def rule(axis_size, is_mapped, *arguments):
        q, q_is_mapped = arguments[0], is_mapped[0]
        batch = q.shape[1] if q_is_mapped else q.shape[0]

        def joined(x, x_is_mapped):
            x = x if x_is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            x = jnp.broadcast_to(x, (axis_size, batch, *x.shape[2:]))
            return x.reshape(axis_size * batch, *x.shape[2:])

        results = run(*jax.tree.map(joined, arguments, tuple(is_mapped)))
        split = jax.tree.map(lambda x: x.reshape(axis_size, batch, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, split)

    return run
