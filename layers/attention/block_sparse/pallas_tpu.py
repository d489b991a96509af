"""Block-sparse attention for TPU: a grid step per listed tile, read from a packed work list in scalar memory.

A work list has one int32 per tile that some pair may use, sorted by the block whose result it adds to: blocks of
queries for the output and dq, blocks of keys for dk and dv. Blocks without any tile get one entry of kind NOTHING,
so that each result is written. The grid's last bound is traced: the longest list of the call, not the room in it.
Where an entry and the next have a block in common, the pipeline does not fetch it again.

Scores are computed keys first, [y, x]: statistics of queries are then rows, [1, x], without a lane of 128 for each
query. FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2, over lists.

Letters: b rows, h query heads, g query heads per list, x queries and y keys of a tile, w entries of a work list.
"""
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from layers.attention.block_lists import BITS_PER_WORD, is_selected
from layers.attention.block_sparse.tiles import (
    ALL,
    NOTHING,
    SOME,
    AttentionSettings,
    Sizes,
    Tiles,
    lacks_in_kernels,
)
from layers.attention.mask import TokenInfo, may_attend
from layers.attention.softcap import softcap

BLOCK_BITS = 14                       # of a block's number in an entry
SCALAR_MEMORY_BYTES = 900 * 2**10     # for work lists, of 1 MiB on v5e and v5p
LANES = 128
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: a difference of two is no NaN


def unsupported(settings: AttentionSettings, sizes: Sizes) -> str | None:
    """Says why the kernel cannot run such a call; None if it can."""
    lacks = lacks_in_kernels(settings, sizes)
    if lacks is not None:
        return lacks
    most = max(sizes.num_query_blocks, sizes.num_key_blocks)
    if most > 2**BLOCK_BITS:
        return f"{most} blocks, {2**BLOCK_BITS} can be numbered; use larger blocks"
    size = 4 * sizes.num_lists * (sizes.num_query_blocks * sizes.list_length + most)
    if size > SCALAR_MEMORY_BYTES:
        return (f"the lists of one batch row take {size / 2**10:.0f} KiB of scalar memory, of which there are "
                f"{SCALAR_MEMORY_BYTES / 2**10:.0f}; use larger blocks, max_blocks, or fewer lists")
    if settings.interpret is False:
        for name, block, count in (("block_q", settings.block_q, sizes.num_query_blocks),
                                   ("block_k", settings.block_k, sizes.num_key_blocks)):
            if block % LANES and count > 1:
                return f"{name} {block} is not a multiple of {LANES}"
    return None


def forward(
    settings: AttentionSettings, q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """q [b, T, h, k], k [b, S, n, k], v [b, S, n, v] -> o [b, T, h, v] in v's dtype, lse [b, h, T] float32."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    work, count = work_list(tiles.ids, tiles.kinds)

    def run(count, work, q, k, v, tiles):
        call = _Call(settings, q, k, work, tiles, by_queries=True)
        x, y, width = settings.block_q, settings.block_k, v.shape[-1]
        return call(
            _forward_kernel, count,
            inputs=[(q, "queries"), (k, "keys"), (v, "keys")],
            outputs=[(jax.ShapeDtypeStruct((*q.shape[:3], width), v.dtype), "queries"),
                     (jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), jnp.float32), "query_row")],
            scratch=[pltpu.VMEM((1, x), jnp.float32), pltpu.VMEM((1, x), jnp.float32),
                     pltpu.VMEM((width, x), jnp.float32)],
            flops_per_tile=2 * x * y * (q.shape[-1] + width))

    o, lse = _row_by_row_if_large(run, count, work, q, k, v, tiles)
    return o.swapaxes(1, 2), lse[:, :, 0]


def backward(
    settings: AttentionSettings, q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles,
    lse: jax.Array, delta: jax.Array, do: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v; delta = sum(o do) - dlse over the values, float32 [b, h, T]."""
    q, k, v, do = (x.swapaxes(1, 2) for x in (q, k, v, do))
    x, y = settings.block_q, settings.block_k
    flops = 2 * x * y * (2 * q.shape[-1] + v.shape[-1])
    of_queries = (lse[:, :, None], delta[:, :, None], do)
    kinds = ("query_row", "query_row", "queries")

    def run_dq(count, work, q, k, v, tiles, *of_queries):
        call = _Call(settings, q, k, work, tiles, by_queries=True)
        return call(
            _dq_kernel, count,
            inputs=[(q, "queries"), (k, "keys"), (v, "keys"), *zip(of_queries, kinds, strict=True)],
            outputs=[(jax.ShapeDtypeStruct(q.shape, q.dtype), "queries")],
            scratch=[pltpu.VMEM((x, q.shape[-1]), jnp.float32)], flops_per_tile=flops)

    def run_dkv(count, work, q, k, v, tiles, *of_queries):
        call = _Call(settings, q, k, work, tiles, by_queries=False)
        shapes = [jax.ShapeDtypeStruct((array.shape[0], call.num_lists, *array.shape[2:]), jnp.float32)
                  for array in (k, v)]
        return call(
            _dkv_kernel, count,
            inputs=[(q, "queries"), (k, "keys"), (v, "keys"), *zip(of_queries, kinds, strict=True)],
            outputs=[(shape, "keys") for shape in shapes],
            scratch=[pltpu.VMEM((y, array.shape[-1]), jnp.float32) for array in (k, v)],
            flops_per_tile=flops + 2 * x * y * v.shape[-1])

    work, count = work_list(tiles.ids, tiles.kinds)
    (dq,) = _row_by_row_if_large(run_dq, count, work, q, k, v, tiles, *of_queries)
    work, count = work_list(tiles.ids, tiles.kinds, num_key_blocks=k.shape[2] // y)
    dk, dv = _row_by_row_if_large(run_dkv, count, work, q, k, v, tiles, *of_queries)

    def summed(gradient, like):  # over the query heads that share keys, where each has a list of its own
        gradient = jnp.sum(gradient.reshape(*like.shape[:2], -1, *like.shape[2:]), axis=2)
        return gradient.astype(like.dtype).swapaxes(1, 2)

    return dq.swapaxes(1, 2), summed(dk, k), summed(dv, v)


def work_list(ids: jax.Array, kinds: jax.Array, num_key_blocks: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Packs lists [b, m, i, l] into one of [b, m, w] each, and how many entries of it count, [b, m] int32.

    Args:
      num_key_blocks: sort by blocks of keys, of which there are so many; None: by blocks of queries.
    """
    num_query_blocks = ids.shape[2]
    query_ids = jnp.broadcast_to(jnp.arange(num_query_blocks)[:, None], ids.shape)
    outer, inner, num_outer = (query_ids, ids, num_query_blocks) if num_key_blocks is None else (
        ids, query_ids, num_key_blocks)
    flat = (*ids.shape[:2], -1)
    outer, inner, kinds = (x.reshape(flat) for x in (outer, inner, kinds))
    is_live = kinds > NOTHING
    unused = jnp.iinfo(jnp.int32).max
    entries = jnp.where(is_live, (outer << (BLOCK_BITS + 2)) | (inner << 2) | kinds, unused)
    is_touched = jnp.any((outer[..., None] == jnp.arange(num_outer)) & is_live[..., None], axis=-2)
    idle = jnp.where(is_touched, unused, jnp.arange(num_outer) << (BLOCK_BITS + 2))
    entries = jnp.sort(jnp.concatenate([entries, idle], axis=-1), axis=-1)
    count = jnp.sum(entries != unused, axis=-1, dtype=jnp.int32)
    last = jnp.take_along_axis(entries, count[..., None] - 1, axis=-1) & ~3  # the same tile, with nothing to do
    return jnp.where(entries == unused, last, entries).astype(jnp.int32), count


class _Entry(NamedTuple):
    """One entry of the work list, as a kernel or an index map reads it."""

    outer: jax.Array
    inner: jax.Array
    kind: jax.Array


def _unpack(entry: jax.Array) -> _Entry:
    return _Entry(entry >> (BLOCK_BITS + 2), (entry >> 2) & (2**BLOCK_BITS - 1), entry & 3)


class _Call:
    """A pallas_call over (row, list or head, entry, query head of a list), and where its blocks lie."""

    def __init__(
        self, settings: AttentionSettings, q: jax.Array, k: jax.Array, work: jax.Array, tiles: Tiles, *,
        by_queries: bool,
    ):
        self.settings, self.work, self.tiles, self.by_queries = settings, work, tiles, by_queries
        self.batch, self.num_heads = q.shape[:2]
        self.num_key_heads = k.shape[1]
        # Of what dk and dv sum over: key heads, or query heads where each has a list of its own.
        self.num_lists = max(self.num_key_heads, work.shape[1])

    def __call__(
        self, kernel: Callable, count: jax.Array, *, inputs, outputs, scratch, flops_per_tile
    ) -> list[jax.Array]:
        settings, tiles = self.settings, self.tiles
        inputs = [*inputs, (tiles.q_tokens[:, 0], "query_tokens"), (tiles.kv_tokens[:, 0], "key_tokens")]
        if tiles.rows is not None:
            inputs.append((tiles.rows, "select"))
        num_steps = jnp.max(count)
        heads_per_list = self.num_heads // self.num_lists
        grid = ((self.batch, self.num_heads, num_steps) if self.by_queries
                else (self.batch, self.num_lists, num_steps, heads_per_list))
        room = math.prod(self.work.shape[2:]) * self.batch * self.num_heads
        bytes_accessed = sum(x.size * x.dtype.itemsize for x, _ in inputs)
        bytes_accessed += sum(math.prod(x.shape) * x.dtype.itemsize for x, _ in outputs)
        return pl.pallas_call(
            functools.partial(kernel, call=self, has_select=tiles.rows is not None),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1, grid=grid,
                in_specs=[self._spec(x, kind) for x, kind in inputs],
                out_specs=[self._spec(x, kind) for x, kind in outputs],
                scratch_shapes=scratch),
            out_shape=[x for x, _ in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", *["arbitrary"] * (len(grid) - 2))),
            # An upper bound: how much of the lists' room is used is known only when the program runs.
            cost_estimate=pl.CostEstimate(
                flops=room * flops_per_tile, transcendentals=room * settings.block_q * settings.block_k,
                bytes_accessed=bytes_accessed),
            name=f"block_sparse_attention{kernel.__name__.removesuffix('_kernel')}",
            interpret=settings.interpret,
        )(self.work.reshape(-1), *(x for x, _ in inputs))

    def head(self, grid_ids) -> jax.Array:
        """Returns the query head of a grid step."""
        if self.by_queries:
            return grid_ids[1]
        return grid_ids[1] * (self.num_heads // self.num_lists) + grid_ids[3]

    def address(self, grid_ids) -> jax.Array:
        """Returns the place in the flat work list at which the list of a grid step begins."""
        rows, lists, room = self.work.shape
        row = grid_ids[0] if rows > 1 else 0
        return (row * lists + _share(self.head(grid_ids), self.num_heads // lists)) * room

    def _spec(self, x: jax.Array, kind: str) -> pl.BlockSpec:
        block_q, block_k = self.settings.block_q, self.settings.block_k
        squeezed = None

        def at(place):
            def index_map(*grid_ids_and_work):
                *ids, work_ref = grid_ids_and_work
                entry = _unpack(work_ref[self.address(ids) + ids[2]])
                query, key = (entry.outer, entry.inner) if self.by_queries else (entry.inner, entry.outer)
                return place(ids[0], self.head(ids), query, key)
            return index_map

        def its(h):  # the head of x that serves query head h
            return _share(h, self.num_heads // x.shape[1])

        shape, place = {
            "queries": ((squeezed, squeezed, block_q, x.shape[-1]), lambda b, h, i, j: (b, h, i, 0)),
            "keys": ((squeezed, squeezed, block_k, x.shape[-1]), lambda b, h, i, j: (b, its(h), j, 0)),
            "query_row": ((squeezed, squeezed, 1, block_q), lambda b, h, i, j: (b, h, 0, i)),
            "query_tokens": ((squeezed, x.shape[1], block_q), lambda b, h, i, j: (b, 0, i)),
            "key_tokens": ((squeezed, x.shape[1], block_k), lambda b, h, i, j: (b, 0, j)),
            "select": ((squeezed, squeezed, x.shape[2], block_q), lambda b, h, i, j: (b, its(h), 0, i)),
        }[kind]
        return pl.BlockSpec(shape, at(place))


class _Step(NamedTuple):
    """The tile of a grid step, and whether the result that it adds to begins or ends there."""

    kind: jax.Array
    key_block: jax.Array
    is_first: jax.Array
    is_last: jax.Array


def _step(call: _Call, work_ref) -> _Step:
    ids = [pl.program_id(axis) for axis in range(3 if call.by_queries else 4)]
    start, step, num_steps = call.address(ids), ids[2], pl.num_programs(2)
    entry = _unpack(work_ref[start + step])
    before = _unpack(work_ref[start + jnp.maximum(step - 1, 0)]).outer
    after = _unpack(work_ref[start + jnp.minimum(step + 1, num_steps - 1)]).outer
    is_first, is_last = (step == 0) | (before != entry.outer), (step == num_steps - 1) | (after != entry.outer)
    if not call.by_queries:  # the query heads of a list take turns in each tile
        is_first, is_last = is_first & (ids[3] == 0), is_last & (ids[3] == pl.num_programs(3) - 1)
    return _Step(entry.kind, entry.inner if call.by_queries else entry.outer, is_first, is_last)


def _for_each_kind(step: _Step, update: Callable, *, has_select: bool) -> None:
    pl.when(step.kind == SOME)(lambda: update(is_masked=True))
    if not has_select:  # with a choice per query, no tile is known to be full
        pl.when(step.kind == ALL)(lambda: update(is_masked=False))


def _forward_kernel(work_ref, q_ref, k_ref, v_ref, *refs, call: _Call, has_select: bool):
    q_tokens, kv_tokens, *select, o_ref, lse_ref, highest_ref, total_ref, acc_ref = refs
    step = _step(call, work_ref)

    @pl.when(step.is_first)
    def _():
        highest_ref[...] = jnp.full_like(highest_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def update(*, is_masked: bool):
        scores, _ = _scores(call.settings, q_ref, k_ref)
        if is_masked:
            allowed = _allowed(call.settings, q_tokens, kv_tokens, select, step.key_block)
            scores = jnp.where(allowed, scores, LOWEST)
        before = highest_ref[...]
        highest = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        weights = jnp.exp(scores - highest)
        if is_masked:  # where all of a column is forbidden, exp(LOWEST - LOWEST) is 1
            weights = jnp.where(allowed, weights, 0)
        kept = jnp.exp(before - highest)
        highest_ref[...] = highest
        total_ref[...] = kept * total_ref[...] + jnp.sum(weights, axis=0, keepdims=True)
        acc_ref[...] = kept * acc_ref[...] + _dot(v_ref[...], weights.astype(v_ref.dtype), 0, 0)  # [v, x]

    _for_each_kind(step, update, has_select=has_select)

    @pl.when(step.is_last)
    def _():
        total = total_ref[...]
        sees_none = total == 0
        safe = jnp.where(sees_none, 1, total)
        o_ref[...] = (acc_ref[...] / safe).T.astype(o_ref.dtype)
        lse_ref[...] = jnp.where(sees_none, -jnp.inf, highest_ref[...] + jnp.log(safe))


def _dq_kernel(work_ref, q_ref, k_ref, v_ref, lse_ref, delta_ref, do_ref, *refs, call: _Call, has_select: bool):
    q_tokens, kv_tokens, *select, dq_ref, acc_ref = refs
    step = _step(call, work_ref)

    @pl.when(step.is_first)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def update(*, is_masked: bool):
        allowed = _allowed(call.settings, q_tokens, kv_tokens, select, step.key_block) if is_masked else None
        _, d_scores = _weights_and_d_scores(
            call.settings, q_ref, k_ref, v_ref, lse_ref, delta_ref, do_ref, allowed)
        acc_ref[...] += _dot(d_scores.astype(k_ref.dtype), k_ref[...], 0, 0)  # [x, k]

    _for_each_kind(step, update, has_select=has_select)

    @pl.when(step.is_last)
    def _():
        dq_ref[...] = acc_ref[...].astype(dq_ref.dtype)


def _dkv_kernel(work_ref, q_ref, k_ref, v_ref, lse_ref, delta_ref, do_ref, *refs, call: _Call, has_select: bool):
    q_tokens, kv_tokens, *select, dk_ref, dv_ref, dk_acc_ref, dv_acc_ref = refs
    step = _step(call, work_ref)

    @pl.when(step.is_first)
    def _():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    def update(*, is_masked: bool):
        allowed = _allowed(call.settings, q_tokens, kv_tokens, select, step.key_block) if is_masked else None
        weights, d_scores = _weights_and_d_scores(
            call.settings, q_ref, k_ref, v_ref, lse_ref, delta_ref, do_ref, allowed)
        dk_acc_ref[...] += _dot(d_scores.astype(q_ref.dtype), q_ref[...], 1, 0)   # [y, k]
        dv_acc_ref[...] += _dot(weights.astype(do_ref.dtype), do_ref[...], 1, 0)  # [y, v]

    _for_each_kind(step, update, has_select=has_select)

    @pl.when(step.is_last)
    def _():
        dk_ref[...] = dk_acc_ref[...]
        dv_ref[...] = dv_acc_ref[...]


def _scores(settings: AttentionSettings, q_ref, k_ref) -> tuple[jax.Array, jax.Array | float]:
    """Computes logits [y, x] in float32, and their derivative by q . k."""
    scores, slope = softcap(settings.scale * _dot(k_ref[...], q_ref[...], 1, 1), settings.softcap)
    return scores, settings.scale * slope


def _weights_and_d_scores(settings: AttentionSettings, q_ref, k_ref, v_ref, lse_ref, delta_ref, do_ref, allowed):
    scores, slope = _scores(settings, q_ref, k_ref)
    lse = lse_ref[...]
    weights = jnp.exp(scores - jnp.where(lse == -jnp.inf, 0, lse))
    if allowed is not None:  # forbids all that a query with lse = -inf could see
        weights = jnp.where(allowed, weights, 0)
    d_weights = _dot(v_ref[...], do_ref[...], 1, 1)
    return weights, weights * (d_weights - delta_ref[...]) * slope


def _allowed(settings: AttentionSettings, q_tokens_ref, kv_tokens_ref, select, key_block) -> jax.Array:
    """Evaluates the mask on a tile, [y, x] bool."""
    queries = TokenInfo(*(q_tokens_ref[f : f + 1, :] for f in range(q_tokens_ref.shape[0])))
    keys = TokenInfo(*(_column(kv_tokens_ref[f : f + 1, :]) for f in range(kv_tokens_ref.shape[0])))
    allowed = may_attend(settings.mask, queries, keys)
    if select:
        allowed &= is_selected(select[0][pl.ds(_share(key_block, BITS_PER_WORD), 1), :], key_block)
    return allowed


def _share(index: jax.Array, size: int) -> jax.Array:
    """Which group of `size` an index is in. `//` looks at signs, for which a kernel must know its chip."""
    return lax.div(index, jnp.int32(size))


def _column(row: jax.Array) -> jax.Array:
    """[1, y] -> [y, 1]; a transpose wants whole tiles."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _dot(x: jax.Array, y: jax.Array, contract_x: int, contract_y: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, (((contract_x,), (contract_y,)), ((), ())),
                           precision=precision, preferred_element_type=jnp.float32)


def _row_by_row_if_large(run: Callable, count: jax.Array, work: jax.Array, *arrays) -> list[jax.Array]:
    """One call for the whole batch, or one per row where the lists of all do not fit into scalar memory."""
    if work.size * work.dtype.itemsize <= SCALAR_MEMORY_BYTES or work.shape[0] == 1:
        return run(count, work, *arrays)
    results = lax.map(lambda row: run(*jax.tree.map(lambda x: x[None], row)), (count, work, *arrays))
    return jax.tree.map(lambda x: x[:, 0], results)
