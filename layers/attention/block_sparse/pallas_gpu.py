"""Block-sparse attention for Hopper GPUs, in Pallas's Mosaic GPU: a thread block per list, which walks its tiles.

Of the three warpgroups in a thread block two compute, 64 rows of scores each: the consumers. The third, the
producer, reads the list and copies tiles into a ring of slots in shared memory, ahead of the others. Lists are
sorted by kind: full tiles come first, in a loop without a predicate, then in another those that need one.

The output and dq have a thread block per block of queries, and scores [x, y]. dk and dv have one per block of
keys, which walks the transposed list, for each query head that shares it in turn, and scores [y, x]: weights and
their gradients then leave one matmul in the registers that the next one reads. The sums take most registers, so
consumers share out keys, or queries, or dk and dv: see `_sharing`.

Rows of tokens (position, segment, lse) are read from shared memory in the layout of a row or column of scores, and
spread over a tile. FlashAttention-2 and -3 (arXiv 2307.08691, 2407.08608), over lists.

Letters: b rows, h query heads, n key heads, m lists, x queries and y keys of a tile.
"""
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from layers.attention.block_lists import BITS_PER_WORD, is_selected
from layers.attention.block_sparse.tiles import (
    ALL,
    NOTHING,
    AttentionSettings,
    Sizes,
    Tiles,
    lacks_in_kernels,
    transpose,
)
from layers.attention.mask import TokenInfo, may_attend
from layers.attention.softcap import bend

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:  # of jax without its GPU dialects
    plgpu = None

CONSUMERS = 2                    # warpgroups
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24  # of a thread; 65536 in all
ROWS = 64                        # of scores per consumer: what one wgmma instruction computes
BLOCK_Q = CONSUMERS * ROWS
WIDTH_STEP = 64                  # of heads: a swizzled row of 128 bytes
MAX_WIDTH = 256
MAX_SLOTS = 4                    # of a ring
MAX_BLOCKS = 2**16 - 1           # on the second axis of a grid
TILE_MEMORY_BYTES = 208 * 2**10  # of 227 KiB of shared memory; the others are for rows of tokens and barriers
LOG2_E = math.log2(math.e)
HOPPERS = ("H100", "H200", "H800", "H20", "GH200")


def unsupported(settings: AttentionSettings, sizes: Sizes) -> str | None:
    """Says why the kernel cannot run such a call; None if it can."""
    lacks = lacks_in_kernels(settings, sizes)
    if lacks is not None:
        return lacks
    if not hasattr(plgpu, "InterpretGPUParams"):
        return f"jax {jax.__version__} is too old, or made without Mosaic GPU; 0.11 has what the kernel needs"
    if sizes.dtype != jnp.bfloat16:
        return f"arrays are {jnp.dtype(sizes.dtype).name}; the kernel multiplies bfloat16"
    if settings.block_q != BLOCK_Q:
        return f"block_q is {settings.block_q}; {BLOCK_Q} fits"
    if settings.block_k not in (ROWS, 2 * ROWS):
        return f"block_k is {settings.block_k}; {ROWS} or {2 * ROWS} fit"
    width = max(sizes.width, sizes.value_width)
    padded = _padded(width)
    if padded > MAX_WIDTH:
        return f"heads are {width} wide; {MAX_WIDTH} is the most"
    if padded > 2 * WIDTH_STEP and settings.block_k != ROWS:
        return f"heads wider than {2 * WIDTH_STEP} need block_k {ROWS}"
    if settings.scale <= 0:
        return f"scale is {settings.scale}; the kernel takes the largest score before it scales"
    most = max(sizes.num_query_blocks, sizes.num_key_blocks)
    if most > MAX_BLOCKS:
        return f"{most} blocks, {MAX_BLOCKS} can be launched; use larger blocks"
    return None if settings.interpret else _other_than_hopper()


def _other_than_hopper() -> str | None:
    """Says what the program is for, if not a Hopper GPU: the abstract mesh in use, or else the device here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        kind = device.device_kind
        return None if any(name in kind for name in HOPPERS) else f"the kernel is for Hopper GPUs; this is {kind}"
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return "there is no GPU here to say whether it is of the Hopper generation"
    return None if device.compute_capability == "9.0" else (
        f"the kernel is for Hopper GPUs; this is {device.device_kind}")


def forward(
    settings: AttentionSettings, q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """q [b, T, h, k], k [b, S, n, k], v [b, S, n, v] -> o [b, T, h, v] in v's dtype, lse [b, h, T] float32."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    value_width = v.shape[-1]
    q, k, v = _same_width(q, k, v)
    lists = _Lists.of(tiles.ids, tiles.kinds)
    inputs = _Inputs(q, k, v, lists, tiles.q_tokens[:, 0], tiles.kv_tokens[:, 0], tiles.rows)
    batch, num_heads, num_queries, width = q.shape
    o, lse = _launch(
        _forward_kernel, settings, inputs, grid=(num_heads, num_queries // BLOCK_Q, batch),
        outputs=(jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)),
        shared=dict(
            q_smem=_tile_memory(CONSUMERS, ROWS, width),
            q_tokens_smem=_row_memory(jnp.int32, CONSUMERS, inputs.num_fields, ROWS),
            lse_smem=_row_memory(jnp.float32, CONSUMERS, ROWS),
            q_barrier=plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2), turn=plgpu.Barrier(num_arrivals=2),
            **_key_rings(settings, inputs, fixed_tokens=BLOCK_Q)))
    return o[..., :value_width].swapaxes(1, 2), lse


def backward(
    settings: AttentionSettings, q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles,
    lse: jax.Array, delta: jax.Array, do: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v; delta = sum(o do) - dlse over the values, float32 [b, h, T]."""
    q, k, v, do = (x.swapaxes(1, 2) for x in (q, k, v, do))
    key_width, value_width = k.shape[-1], v.shape[-1]
    q, k, v, do = _same_width(q, k, v, do)
    # What has lse = -inf sees nothing: all its pairs are forbidden, whatever the number here.
    statistics = jnp.stack([jnp.where(lse == -jnp.inf, 0, lse * LOG2_E), delta], axis=2)
    lists = _Lists.of(tiles.ids, tiles.kinds)
    inputs = _Inputs(q, k, v, lists, tiles.q_tokens[:, 0], tiles.kv_tokens[:, 0], tiles.rows, statistics, do)
    (batch, num_heads, num_queries, width), (num_key_heads, num_keys) = q.shape, k.shape[1:3]
    (dq,) = _launch(
        _dq_kernel, settings, inputs, grid=(num_heads, num_queries // BLOCK_Q, batch),
        outputs=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        shared=dict(
            q_smem=_tile_memory(CONSUMERS, ROWS, width), do_smem=_tile_memory(CONSUMERS, ROWS, width),
            q_tokens_smem=_row_memory(jnp.int32, CONSUMERS, inputs.num_fields, ROWS),
            statistics_smem=_row_memory(jnp.float32, CONSUMERS, 2, ROWS),
            q_barrier=plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=4),
            **_key_rings(settings, inputs, fixed_tokens=2 * BLOCK_Q)))

    block = settings.block_k
    num_lists = max(num_key_heads, tiles.ids.shape[1])  # query heads where each has a list of its own
    num_parts = CONSUMERS if _sharing(settings, width) == "queries" else 1
    inputs = inputs._replace(lists=_Lists.of(*transpose(tiles.ids, tiles.kinds, num_keys // block)))
    shape = jax.ShapeDtypeStruct((batch, num_lists, num_parts, num_keys, width), jnp.float32)
    dk, dv = _launch(
        _dkv_kernel, settings, inputs, grid=(num_lists, num_keys // block, batch), outputs=(shape, shape),
        shared=dict(
            k_smem=_tile_memory(block, width), v_smem=_tile_memory(block, width),
            kv_tokens_smem=_row_memory(jnp.int32, inputs.num_fields, block),
            k_barrier=plgpu.Barrier(num_arrivals=3),
            queries=_query_ring(inputs, fixed_tokens=2 * block)))

    def summed(gradient, used):  # over parts, and over query heads that share keys and not their list
        total = jnp.sum(gradient.reshape(batch, num_key_heads, -1, num_keys, width), axis=2)
        return total[..., :used].astype(k.dtype).swapaxes(1, 2)

    return dq[..., :key_width].swapaxes(1, 2), summed(dk, key_width), summed(dv, value_width)


def _forward_kernel(
    settings: AttentionSettings, inputs: "_Inputs", outputs, *,
    q_smem, q_tokens_smem, lse_smem, q_barrier, turn, keys, values,
):
    place = _Place.of_queries(inputs)
    tiles = inputs.lists.at(place)

    @_as_producer
    def _():
        _fetch_keys(settings, inputs, place, tiles, keys, values)

    @_as_consumer
    def _(me):
        (o_ref, lse_ref), q_ref, q_tokens = outputs, q_smem.at[me], q_tokens_smem.at[me]
        queries = pl.ds(place.block * BLOCK_Q + me * ROWS, ROWS)
        mine = place.row, place.list, queries
        _fetch(q_barrier.at[me], (inputs.q.at[mine], q_ref),
               (inputs.q_tokens.at[place.row, :, queries], q_tokens))
        plgpu.barrier_wait(q_barrier.at[me])

        # The consumers take turns, half a step apart: one computes weights while matmuls of the other run.
        def meet():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def attend(step, carry, *, is_masked):
            highest, total, acc = carry
            slot = keys.wait(step)
            key_ref, kv_tokens, *select = (buffer.at[slot] for buffer in keys.buffers)

            def issue(scores_ref):
                plgpu.wgmma(scores_ref, q_ref, key_ref.transpose((1, 0)))
                meet()
                return scores_ref[...]

            scores = pl.run_scoped(issue, plgpu.ACC((ROWS, settings.block_k), jnp.float32))
            scores, factor, _ = _bend(settings, scores)
            if is_masked:
                select = [words.at[pl.ds(me * ROWS, ROWS)] for words in select]
                allowed = _allowed(settings, scores.shape, 0, q_tokens, kv_tokens, select, tiles.block(step))
                scores = jnp.where(allowed, scores, -jnp.inf)
            keys.release(slot)
            new_highest = jnp.maximum(highest, factor * jnp.max(scores, axis=1))
            # A row whose keys are all forbidden so far: exp2(-inf - 0) is 0, exp2(-inf - -inf) no number.
            shift = jnp.where(new_highest == -jnp.inf, 0, new_highest) if is_masked else new_highest
            weights = jnp.exp2(factor * scores - _spread(shift, 0, scores.shape))
            kept = jnp.exp2(highest - shift)
            total = kept * total + jnp.sum(weights, axis=1)
            acc = acc * _spread(kept, 0, acc.shape)
            weights = weights.astype(inputs.v.dtype)
            new_highest, total, acc, weights = lax.optimization_barrier((new_highest, total, acc, weights))
            plgpu.barrier_arrive(turn)
            slot = values.wait(step)
            plgpu.barrier_wait(turn)
            (acc,) = _add_products(settings, (acc, weights, values.buffers[0].at[slot]))
            values.release(slot)
            return new_highest, total, acc

        pl.when(me == 1)(meet)
        highest, total, acc = tiles.loop(attend, (_row_of(-jnp.inf), _row_of(0), _zeros(ROWS, q_ref.shape[-1])))
        pl.when(me == 0)(meet)
        safe = jnp.where(total == 0, 1, total)
        q_ref[...] = (acc / _spread(safe, 0, acc.shape)).astype(q_ref.dtype)
        lse_smem[me] = jnp.where(total == 0, -jnp.inf, highest / LOG2_E + jnp.log(safe))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_ref, o_ref.at[mine])
        plgpu.copy_smem_to_gmem(lse_smem.at[me], lse_ref.at[mine])
        plgpu.wait_smem_to_gmem(0)


def _dq_kernel(
    settings: AttentionSettings, inputs: "_Inputs", outputs, *,
    q_smem, do_smem, q_tokens_smem, statistics_smem, q_barrier, keys, values,
):
    place = _Place.of_queries(inputs)
    tiles = inputs.lists.at(place)

    @_as_producer
    def _():
        _fetch_keys(settings, inputs, place, tiles, keys, values)

    @_as_consumer
    def _(me):
        q_ref, do_ref, q_tokens, statistics = (x.at[me] for x in (q_smem, do_smem, q_tokens_smem, statistics_smem))
        queries = pl.ds(place.block * BLOCK_Q + me * ROWS, ROWS)
        mine = place.row, place.list, queries
        _fetch(q_barrier.at[me], (inputs.q.at[mine], q_ref), (inputs.do.at[mine], do_ref),
               (inputs.q_tokens.at[place.row, :, queries], q_tokens),
               (inputs.statistics.at[place.row, place.list, :, queries], statistics))
        plgpu.barrier_wait(q_barrier.at[me])

        def add(step, dq, *, is_masked):
            slot, value_slot = keys.wait(step), values.wait(step)
            key_ref, kv_tokens, *select = (buffer.at[slot] for buffer in keys.buffers)
            products, allowed = _products(q_smem.at[_anew(me)], key_ref), None
            if is_masked:
                select = [words.at[pl.ds(me * ROWS, ROWS)] for words in select]
                allowed = _allowed(settings, products.shape, 0, q_tokens, kv_tokens, select, tiles.block(step))
            _, sloped = _weights(settings, products, statistics, 0, allowed)
            d_weights = _products(do_smem.at[_anew(me)], values.buffers[0].at[_anew(value_slot)])
            values.release(value_slot)
            d_scores = _d_scores(sloped, d_weights, statistics, 0)
            (dq,) = _add_products(settings, (dq, d_scores.astype(inputs.k.dtype), keys.buffers[0].at[_anew(slot)]))
            keys.release(slot)
            return dq

        dq = tiles.loop(add, _zeros(ROWS, q_ref.shape[-1]))
        q_ref[...] = (settings.scale * dq).astype(q_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_ref, outputs[0].at[mine])
        plgpu.wait_smem_to_gmem(0)


def _dkv_kernel(
    settings: AttentionSettings, inputs: "_Inputs", outputs, *,
    k_smem, v_smem, kv_tokens_smem, k_barrier, queries,
):
    place = _Place.of_keys(inputs)
    tiles = inputs.lists.at(place)
    width = k_smem.shape[-1]

    @_as_producer
    def _():
        tokens, mine = pl.ds(place.block * settings.block_k, settings.block_k), place.in_array(inputs.k)
        _fetch(k_barrier, (inputs.k.at[*mine, tokens], k_smem), (inputs.v.at[*mine, tokens], v_smem),
               (inputs.kv_tokens.at[place.row, :, tokens], kv_tokens_smem))
        _fetch_queries(inputs, place, tiles, queries)

    def consume(gradients, chunk, halves, part):
        """Sums up `gradients` for the 64 keys of a chunk, over a range of the two halves of each query block."""
        plgpu.barrier_wait(k_barrier)

        def add(step, sums, *, is_masked):
            slot = queries.wait(step)
            sums = lax.fori_loop(*halves, functools.partial(add_half, slot, is_masked), sums)
            queries.release(slot)
            return sums

        def add_half(slot, is_masked, half, sums):
            half, now = pl.ds(half * ROWS, ROWS), pl.ds(_anew(jnp.int32(chunk)) * ROWS, ROWS)
            key_ref, value_ref, kv_tokens = k_smem.at[now], v_smem.at[now], kv_tokens_smem.at[:, now]
            q_ref, do_ref = (buffer.at[slot, half] for buffer in queries.buffers[:2])
            q_tokens, statistics, *select = (buffer.at[slot, ..., half] for buffer in queries.buffers[2:])
            products, allowed = _products(key_ref, q_ref), None
            if is_masked:
                allowed = _allowed(settings, products.shape, 1, q_tokens, kv_tokens, select, place.block)
            weights, sloped = _weights(settings, products, statistics, 1, allowed)
            terms = {}
            if "dv" in sums:
                terms["dv"] = sums["dv"], weights.astype(inputs.do.dtype), do_ref
            if "dk" in sums:  # no earlier: the predicate needs the registers
                terms["d_weights"] = _zeros(ROWS, ROWS), value_ref, do_ref.transpose((1, 0))
            results = dict(zip(terms, _add_products(settings, *terms.values()), strict=True))
            if "dk" in sums:
                d_scores = _d_scores(sloped, results["d_weights"], statistics, 1).astype(inputs.q.dtype)
                (results["dk"],) = _add_products(settings, (sums["dk"], d_scores, q_ref))
            return {name: results[name] for name in sums}

        sums = tiles.loop(add, {name: _zeros(ROWS, width) for name in gradients})
        tokens = pl.ds(place.block * settings.block_k + chunk * ROWS, ROWS)
        for name, total in sums.items():
            ref, factor = {"dk": (outputs[0], settings.scale), "dv": (outputs[1], 1)}[name]
            ref[place.row, place.list, part, tokens] = factor * total

    @_as_consumer
    def _(me):
        match _sharing(settings, width):
            case "keys":
                consume(["dk", "dv"], me, (0, 2), part=0)
            case "queries":
                consume(["dk", "dv"], 0, (me, me + 1), part=me)
            case "gradients":
                for i, name in enumerate(["dk", "dv"]):
                    pl.when(me == i)(functools.partial(consume, [name], 0, (0, 2), part=0))


def _sharing(settings: AttentionSettings, width: int) -> str:
    """Chooses how consumers divide the work on dk and dv, so that each has registers for its sums.

    Keys, 64 each, if there are so many; else queries, whose two parts of a gradient are added later. Of wide heads
    one consumer has room for dk, the other for dv: some products are then computed twice.
    """
    if width > 2 * WIDTH_STEP:
        return "gradients"
    return "keys" if settings.block_k == CONSUMERS * ROWS else "queries"


class _Lists(NamedTuple):
    """In global memory: the tiles of each block, full ones first."""

    num_all: jax.Array   # [b or 1, m, i]
    num_live: jax.Array  # [b or 1, m, i]
    ids: jax.Array       # [b or 1, m, i, l]

    @classmethod
    def of(cls, ids: jax.Array, kinds: jax.Array) -> "_Lists":
        def count(which):
            return jnp.sum(which, axis=-1, dtype=jnp.int32)

        return cls(count(kinds == ALL), count(kinds != NOTHING), ids)

    def at(self, place: "_Place") -> "_List":
        index, repeats = (*place.in_array(self.ids), place.block), place.num_repeats
        return _List(self.num_all[index] * repeats, self.num_live[index] * repeats, self.ids, index, repeats)


class _List(NamedTuple):
    """The tiles of one block, a step each, or one for each query head of a list."""

    num_all: jax.Array   # steps with full tiles
    num_live: jax.Array  # all steps
    ids_ref: Any
    index: tuple         # of the list in ids_ref
    num_repeats: int     # steps per tile

    def block(self, step: jax.Array) -> jax.Array:
        return self.ids_ref[*self.index, lax.div(step, self.num_repeats)]

    def loop(self, update: Callable, start):
        """Full tiles, then those that need the predicate."""
        carry = lax.fori_loop(0, self.num_all, functools.partial(update, is_masked=False), start)
        return lax.fori_loop(self.num_all, self.num_live, functools.partial(update, is_masked=True), carry)


class _Inputs(NamedTuple):
    """In global memory."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lists: _Lists
    q_tokens: jax.Array   # [b, f, T], fields as in Tiles
    kv_tokens: jax.Array
    rows: jax.Array | None
    statistics: jax.Array | None = None  # [b, h, 2, T]: lse, in units of log 2, and delta
    do: jax.Array | None = None

    @property
    def num_fields(self) -> int:
        return self.q_tokens.shape[1]


class _Place(NamedTuple):
    """The work of one thread block."""

    row: jax.Array
    list: jax.Array   # a query head, or all those that share keys and list
    block: jax.Array
    num_lists: int
    num_repeats: int  # query heads per list

    @classmethod
    def of_queries(cls, inputs: _Inputs) -> "_Place":
        return cls(lax.axis_index("row"), lax.axis_index("list"), lax.axis_index("block"), inputs.q.shape[1], 1)

    @classmethod
    def of_keys(cls, inputs: _Inputs) -> "_Place":
        num_lists = max(inputs.k.shape[1], inputs.lists.ids.shape[1])
        return cls(lax.axis_index("row"), lax.axis_index("list"), lax.axis_index("block"), num_lists,
                   inputs.q.shape[1] // num_lists)

    def in_array(self, x) -> tuple:
        """Returns the indices at which x [b or 1, m, ...] has the data of this row and list."""
        return self.row if x.shape[0] > 1 else 0, lax.div(self.list, self.num_lists // x.shape[1])


class _Ring(NamedTuple):
    """Shared memory that the producer fills and the consumers read, one slot after the other, and again."""

    buffers: tuple  # with a leading axis of slots
    is_full: Any    # a barrier per slot, as is_free
    is_free: Any

    @classmethod
    def of(cls, slots: int, *buffers) -> "_Ring":
        return cls(buffers, plgpu.Barrier(num_barriers=slots, num_arrivals=len(buffers)),
                   plgpu.Barrier(num_barriers=slots, num_arrivals=CONSUMERS))

    @property
    def num_slots(self) -> int:
        return self.is_full.shape[0]

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, self.num_slots)

    def fill(self, step: jax.Array, *sources) -> None:
        slot = self.slot(step)
        pl.when(step >= self.num_slots)(lambda: plgpu.barrier_wait(self.is_free.at[slot]))
        _fetch(self.is_full.at[slot],
               *((source, buffer.at[slot]) for source, buffer in zip(sources, self.buffers, strict=True)))

    def drain(self, num_steps: jax.Array) -> None:
        """Waits until what was filled is read: no barrier may be left with arrivals that nobody saw."""
        @pl.loop(jnp.maximum(num_steps - self.num_slots, 0), num_steps)
        def _(step):
            plgpu.barrier_wait(self.is_free.at[self.slot(step)])

    def wait(self, step: jax.Array) -> jax.Array:
        slot = self.slot(step)
        plgpu.barrier_wait(self.is_full.at[slot])
        return slot

    def release(self, slot: jax.Array) -> None:
        plgpu.barrier_arrive(self.is_free.at[slot])


def _key_rings(settings: AttentionSettings, inputs: _Inputs, *, fixed_tokens: int) -> dict[str, _Ring]:
    block, width = settings.block_k, inputs.k.shape[-1]
    slots = _num_slots(width, fixed_tokens, 2 * block)
    select = () if inputs.rows is None else (_row_memory(jnp.int32, slots, BLOCK_Q),)
    return dict(
        keys=_Ring.of(slots, _tile_memory(slots, block, width),
                      _row_memory(jnp.int32, slots, inputs.num_fields, block), *select),
        values=_Ring.of(slots, _tile_memory(slots, block, width)))


def _fetch_keys(
    settings: AttentionSettings, inputs: _Inputs, place: _Place, tiles: _List, keys: _Ring, values: _Ring
):
    """All tiles of a list of key blocks, into the rings."""
    select = inputs.rows

    @pl.loop(0, tiles.num_live)
    def _(step):
        block = tiles.block(step)
        tokens = pl.ds(block * settings.block_k, settings.block_k)
        mine = place.in_array(inputs.k)
        sources = [inputs.k.at[*mine, tokens], inputs.kv_tokens.at[place.row, :, tokens]]
        if select is not None:
            queries = pl.ds(place.block * BLOCK_Q, BLOCK_Q)
            sources.append(select.at[*place.in_array(select), lax.div(block, BITS_PER_WORD), queries])
        keys.fill(step, *sources)
        values.fill(step, inputs.v.at[*mine, tokens])

    keys.drain(tiles.num_live)
    values.drain(tiles.num_live)


def _query_ring(inputs: _Inputs, *, fixed_tokens: int) -> _Ring:
    width = inputs.q.shape[-1]
    slots = _num_slots(width, fixed_tokens, 2 * BLOCK_Q)
    select = () if inputs.rows is None else (_row_memory(jnp.int32, slots, BLOCK_Q),)
    tile = _tile_memory(slots, BLOCK_Q, width)
    return _Ring.of(slots, tile, tile, _row_memory(jnp.int32, slots, inputs.num_fields, BLOCK_Q),
                    _row_memory(jnp.float32, slots, 2, BLOCK_Q), *select)


def _num_slots(width: int, fixed_tokens: int, tokens_per_slot: int) -> int:
    """Counts the slots of a ring that fit beside the fixed tokens in shared memory; both are bfloat16."""
    room = TILE_MEMORY_BYTES // (2 * width)
    return min(MAX_SLOTS, (room - fixed_tokens) // tokens_per_slot)


def _fetch_queries(inputs: _Inputs, place: _Place, tiles: _List, queries: _Ring):
    """All tiles of a list of query blocks, for each query head of the list, into the ring."""
    select = inputs.rows

    @pl.loop(0, tiles.num_live)
    def _(step):
        tokens = pl.ds(tiles.block(step) * BLOCK_Q, BLOCK_Q)
        head = place.list * place.num_repeats + lax.rem(step, place.num_repeats)
        sources = [inputs.q.at[place.row, head, tokens], inputs.do.at[place.row, head, tokens],
                   inputs.q_tokens.at[place.row, :, tokens], inputs.statistics.at[place.row, head, :, tokens]]
        if select is not None:
            sources.append(select.at[*place.in_array(select), lax.div(place.block, BITS_PER_WORD), tokens])
        queries.fill(step, *sources)

    queries.drain(tiles.num_live)


def _fetch(barrier, *copies) -> None:
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier)


def _bend(settings: AttentionSettings, products: jax.Array) -> tuple[jax.Array, float, jax.Array | None]:
    """Returns scores before a factor, the factor, in units of log 2, and the derivative by scale x products.

    The derivative is None where it is 1.
    """
    if settings.softcap is None:
        return products, settings.scale * LOG2_E, None

    def tanh(products):
        # tanh z = 1 - 2 / (1 + exp 2z). The instruction for tanh is good to 2^-11, too little for scores of 30;
        # those for exp2 and the reciprocal root are good to 2^-22.
        root = lax.rsqrt(1 + jnp.exp2(products * (2 * LOG2_E * settings.scale / settings.softcap)))
        return 1 - 2 * root * root

    bent, slope = bend(products, tanh)
    return bent, settings.softcap * LOG2_E, slope


def _weights(
    settings: AttentionSettings, products, statistics, query_axis: int, allowed
) -> tuple[jax.Array, jax.Array]:
    """Softmax weights, and these times the derivative of the scores by scale x products."""
    scores, factor, slope = _bend(settings, products)
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    weights = jnp.exp2(factor * scores - _spread(_vector(statistics.at[0], query_axis), query_axis, scores.shape))
    return weights, weights if slope is None else weights * slope


def _d_scores(sloped, d_weights, statistics, query_axis: int) -> jax.Array:
    """The gradient by scale x products."""
    return sloped * (d_weights - _spread(_vector(statistics.at[1], query_axis), query_axis, sloped.shape))


def _allowed(
    settings: AttentionSettings, shape, query_axis: int, q_tokens, kv_tokens, select, key_block
) -> jax.Array:
    """Tells which pairs of a tile may attend, bool; fields of tokens lie in shared memory."""
    def tokens(fields, axis):
        return TokenInfo(*(_vector(fields.at[f], axis) for f in range(fields.shape[0])))

    queries, keys = tokens(q_tokens, query_axis), tokens(kv_tokens, 1 - query_axis)
    for words in select:  # segment 0 sees nothing
        is_read = is_selected(_vector(words, query_axis), key_block)
        queries = queries._replace(segment=jnp.where(is_read, queries.segment, 0))
    return may_attend(
        settings.mask, jax.tree.map(lambda x: _spread(x, query_axis, shape), queries),
        jax.tree.map(lambda x: _spread(x, 1 - query_axis, shape), keys))


def _vector(ref, axis: int) -> jax.Array:
    """A vector in shared memory that belongs to an axis of a tile."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis))


def _spread(vector: jax.Array, axis: int, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [axis])


def _row_of(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _zeros(*shape: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _anew(x: jax.Array) -> jax.Array:
    """x, of which the compiler cannot tell that it is the same in each turn of a loop.

    It would otherwise compute the addresses of all parts of a tile beforehand, and run out of registers.
    """
    return lax.optimization_barrier(x)


def _products(x_ref, y_ref) -> jax.Array:
    """x @ y^T, both in shared memory."""
    def issue(acc_ref):
        plgpu.wgmma(acc_ref, x_ref, y_ref.transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(issue, plgpu.ACC((x_ref.shape[0], y_ref.shape[0]), jnp.float32))


def _add_products(settings: AttentionSettings, *terms: tuple) -> tuple[jax.Array, ...]:
    """acc + x @ y for each (acc, x, y), all at once: acc in registers, y in shared memory, x in either."""
    accs, xs, y_refs = zip(*terms, strict=True)
    if settings.interpret is False:
        def issue(acc_refs):
            for acc_ref, x, y_ref in zip(acc_refs, xs, y_refs, strict=True):
                plgpu.wgmma(acc_ref, x, y_ref)

        return pl.run_state(issue)(tuple(map(plgpu.ACC.init, accs)))
    # The interpreter has no wgmma that begins with a value, or reads registers.
    results = tuple(acc + jnp.dot(x[...], y_ref[...], preferred_element_type=jnp.float32)
                    for acc, x, y_ref in zip(accs, xs, y_refs, strict=True))
    plgpu.commit_smem()
    return results


def _launch(
    kernel: Callable, settings: AttentionSettings, inputs: _Inputs, *, grid, outputs, shared
) -> list[jax.Array]:
    arrays, structure = jax.tree.flatten(inputs)

    def body(*refs, **shared):
        kernel(settings, jax.tree.unflatten(structure, refs[: len(arrays)]), refs[len(arrays):], **shared)

    interpret = {} if settings.interpret is False else {
        "interpret": plgpu.InterpretGPUParams() if settings.interpret is True else settings.interpret}
    return plgpu.kernel(
        body, out_type=outputs, scratch_types=shared,
        kernel_name=f"block_sparse_attention{kernel.__name__.removesuffix('_kernel')}",
        # The first axis is the fastest: heads that share keys run at about the same time.
        grid=grid, grid_names=("list", "block", "row"), num_threads=CONSUMERS + 1, thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True), **interpret,
    )(*arrays)


def _as_producer(body: Callable) -> None:
    @pl.when(lax.axis_index("warpgroup") == CONSUMERS)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        body()


def _as_consumer(body: Callable) -> None:
    me = lax.axis_index("warpgroup")

    @pl.when(me < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        body(me)


def _tile_memory(*shape: int):
    """Makes shared memory of bfloat16, laid out as wgmma reads it."""
    return plgpu.SMEM(
        shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, WIDTH_STEP)), plgpu.SwizzleTransform(128)))


def _row_memory(dtype, *shape: int):
    return plgpu.SMEM(shape, dtype)


def _same_width(*arrays: jax.Array) -> list[jax.Array]:
    """Pads the last axes with zeros, which change no product, to the width that a kernel is made for."""
    width = _padded(max(x.shape[-1] for x in arrays))
    return [x if x.shape[-1] == width else jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in arrays]


def _padded(width: int) -> int:
    return -(-width // WIDTH_STEP) * WIDTH_STEP
