"""Keys and values that are kept of the past, and the tokens that are to be added to them.

A cache has a fixed number of slots per row. Which token is in which slot, and which one makes room, is up to a
`CachePolicy`; reading goes by the position and the segment of each slot, so slots may be filled in any order.

A row is in one segment at a time. When tokens of another one come, positions start at 0 and all slots are freed,
so a segment id may come again later, after a segment of another id.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Int, typed
from layers.arrays.segments import carried_segment, segment_ordinals, segment_positions

FREE = -1  # the position of a slot that holds no token


class KVCache(NamedTuple):
    """Keys and values of the tokens read so far, or of those that a policy kept.

    Keys are rotated already, unless the policy says otherwise. `p` is 1, or n where every key head keeps tokens
    of its own.
    """

    k: jax.Array                  # [b, n, s, k]: as the matmuls read it, so that no step transposes it
    v: jax.Array                  # [b, n, s, v]
    positions: jax.Array          # [b, p, s] int32: place in its segment of the token in each slot; -1 = free
    segments: jax.Array           # [b, p, s] int32: id of its segment
    log_weight: jax.Array | None  # [b, p, s] float32, added to the scores of a slot that stands for several tokens
    aux: Any                      # a pytree of [b, p, s, ...]: what the policy remembers of each slot
    num_read: jax.Array           # [b] int32: tokens read of the segment that the row is in

    @classmethod
    def empty(
        cls, batch: int, num_slots: int, num_key_heads: int, key_width: int, dtype: jnp.dtype, *,
        value_width: int | None = None, per_head: bool = False, is_weighted: bool = False, aux: Any = None,
    ) -> "KVCache":
        """Makes a cache without tokens; values are as wide as keys unless `value_width` says otherwise."""
        shape = (batch, num_key_heads, num_slots)
        per_slot = (batch, num_key_heads if per_head else 1, num_slots)
        return cls(
            k=jnp.zeros((*shape, key_width), dtype),
            v=jnp.zeros((*shape, key_width if value_width is None else value_width), dtype),
            positions=jnp.full(per_slot, FREE, jnp.int32),
            segments=jnp.zeros(per_slot, jnp.int32),
            log_weight=jnp.zeros(per_slot, jnp.float32) if is_weighted else None,
            aux=aux,
            num_read=jnp.zeros(batch, jnp.int32))

    @property
    def num_slots(self) -> int:
        return self.k.shape[2]

    @property
    def is_occupied(self) -> Bool[Array, "b p s"]:
        return self.positions >= 0


class KVUpdate(NamedTuple):
    """Keys and values that new tokens add. Layers return it in place of a new cache, which saves copying that."""

    k: jax.Array                       # [b, t, n, k]
    v: jax.Array                       # [b, t, n, v]
    positions: jax.Array               # [b, t] int32: place of each token in its segment; -1 = padding
    segments: jax.Array                # [b, t] int32; 0 = padding
    aux: Any = None                    # a pytree of [b, p, t, ...] like that of the cache; None = zeros
    received: jax.Array | None = None  # [b, n, s] float32: attention from the new tokens to the slots before
    queries: jax.Array | None = None   # [b, t, h, k]: of the new tokens


class Placement(NamedTuple):
    """Places of new tokens relative to those of a cache: see `place`."""

    positions: jax.Array  # [b, t] int32: place of each token in its segment; -1 at padding
    segments: jax.Array   # [b, t] int32: 1 for the first segment among the new tokens, then 2, ...; 0 at padding
    in_cache: jax.Array   # [b, p, s] int32: 1 at the slots that hold tokens of that first segment; 0 elsewhere
    continues: jax.Array  # [b] bool: the cache is in that first segment


@typed
def place(cache: KVCache, segment_ids: Int[Array, "b t"]) -> Placement:
    """Counts positions of new tokens on from those of the cache if they continue its segment, otherwise from 0."""
    is_real = segment_ids != 0
    newest = jnp.argmax(cache.positions.reshape(cache.positions.shape[0], -1), axis=1)[:, None]
    held = jnp.take_along_axis(cache.segments.reshape(cache.segments.shape[0], -1), newest, axis=1)[:, 0]
    carried = carried_segment(segment_ids, held)
    continues = carried != 0
    ordinals = segment_ordinals(segment_ids)
    num_before = jnp.where(continues[:, None] & (ordinals == 1), cache.num_read[:, None], 0)
    positions = jnp.where(is_real, num_before + segment_positions(segment_ids), FREE)
    in_cache = cache.is_occupied & continues[:, None, None] & (cache.segments == carried[:, None, None])
    return Placement(positions, jnp.where(is_real, ordinals, 0), in_cache.astype(jnp.int32), continues)


@typed
def empty_update(cache: KVCache) -> KVUpdate:
    """Makes the update of one padding token per row, which changes nothing."""
    batch, num_key_heads, _, key_width = cache.k.shape
    shape = (batch, 1, num_key_heads)
    return KVUpdate(
        jnp.zeros((*shape, key_width), cache.k.dtype), jnp.zeros((*shape, cache.v.shape[-1]), cache.v.dtype),
        jnp.full((batch, 1), FREE, jnp.int32), jnp.zeros((batch, 1), jnp.int32))


class NewTokens(NamedTuple):
    """An update with what a policy asks of it: which of its tokens count, and the cache they go to."""

    cache: KVCache       # with all slots freed in rows that another segment has begun
    is_kept: jax.Array   # [b, t] bool: tokens of the last segment of each row, which alone may be read again
    num_read: jax.Array  # [b] int32: tokens of that segment, those of the update included


@typed
def admit(cache: KVCache, new: KVUpdate) -> NewTokens:
    """Frees the slots of rows that begin another segment, and finds the new tokens that count."""
    placement = place(cache, new.segments)
    is_real = new.positions >= 0
    last = jnp.max(placement.segments, axis=1)
    begins = (last > 1) | ((last == 1) & ~placement.continues)
    is_kept = is_real & (placement.segments == last[:, None])
    positions = jnp.where(begins[:, None, None], FREE, cache.positions)
    num_read = jnp.where(last > 0, jnp.max(jnp.where(is_kept, new.positions, FREE), axis=1) + 1, cache.num_read)
    return NewTokens(cache._replace(positions=positions), is_kept, num_read)


@typed
def write(cache: KVCache, new: KVUpdate, slots: Int[Array, "b p t"], num_read: Int[Array, "b"]) -> KVCache:
    """Puts each new token into its slot, in place where XLA may; a slot of -1 drops the token.

    Args:
      slots: no slot but -1 twice in a row; p as in the cache.
    """
    num_slots = cache.num_slots
    slots = jnp.where(slots < 0, num_slots, slots)  # one past the end is dropped
    row = jnp.arange(slots.shape[0])[:, None]

    def put_heads(old, tokens):  # [b, n, s, k], [b, t, n, k]
        if slots.shape[1] == 1:
            return old.at[row, :, slots[:, 0]].set(tokens, mode="drop")
        return old.at[row[:, :, None], jnp.arange(old.shape[1])[:, None], slots].set(
            tokens.swapaxes(1, 2), mode="drop")

    def put(old, tokens):  # [b, p, s, ...], [b, p, t, ...]
        return old.at[row[:, :, None], jnp.arange(slots.shape[1])[:, None], slots].set(tokens, mode="drop")

    aux = jax.tree.map(lambda old: jnp.zeros((), old.dtype), cache.aux) if new.aux is None else new.aux
    return KVCache(
        k=put_heads(cache.k, new.k), v=put_heads(cache.v, new.v),
        positions=put(cache.positions, new.positions[:, None]),
        segments=put(cache.segments, new.segments[:, None]),
        log_weight=None if cache.log_weight is None else put(cache.log_weight, 0.0),
        aux=jax.tree.map(put, cache.aux, aux), num_read=num_read)
