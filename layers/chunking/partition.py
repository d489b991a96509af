"""A cut of token rows into chunks, each of which owns a slot.

Everything has a static shape: a row of t tokens owns a fixed number of slots c, its chunks fill the first of them
in order, and slots beyond carry segment id 0, that is, they are padding. H-Net (arXiv 2507.07955), section 2.2:

  p         = router(x, segment_ids)                                      where chunks begin  [b, t]
  partition = Partition.from_boundaries(p > 0.5, segment_ids, num_slots)  who owns which slot
  z         = inner network on chunk(x, partition)                                            [b, c, d]
  y, _      = dechunk(z, p, partition); y * straight_through(...)         smoothing, upsampling [b, t, d]

Rows may share one buffer of slots instead (`pack_rows`): to everything here the buffer is then one long row,
in which the rows are segments.
"""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Int, Scalar, typed
from layers.arrays.segments import (
    carried_segment,
    count_in_segment,
    last_real,
    segment_ordinals,
    segment_positions,
    segment_starts,
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["segment_ids", "starts_chunk", "slot", "first_token", "chunk_segment_ids", "num_overflow",
                 "carried_segment"],
    meta_fields=["block"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """The chunk that each token starts and the slot that it reads, for rows of t tokens and c slots.

    Attributes:
      segment_ids: [b, t] int32, of the tokens; 0 = padding.
      starts_chunk: [b, t] bool, the boundaries that got a slot.
      slot: [b, t] int32, the slot that a token reads; c where there is none.
      first_token: [b, c] int32, the token that starts the chunk in each slot; t if the slot is empty.
      chunk_segment_ids: [b, c] int32, the segment of each chunk; 0 for an empty slot.
      num_overflow: [b] int32, boundaries past the last slot; their tokens join the chunk before.
      carried_segment: [b] int32, the segment of the chunk that each row came in with, from earlier calls; its
        tokens read that chunk where they read no slot. 0: there is none.
      block: every slot holds this many tokens of the row, in order; None: chunks have any length.
    """

    segment_ids: jax.Array
    starts_chunk: jax.Array
    slot: jax.Array
    first_token: jax.Array
    chunk_segment_ids: jax.Array
    num_overflow: jax.Array
    carried_segment: jax.Array
    block: int | None = None

    @classmethod
    @typed
    def from_boundaries(
        cls,
        boundary_mask: Bool[Array, "b t"],
        segment_ids: Int[Array, "b t"],
        num_slots: int,
        *,
        last_segment: Int[Array, "b"] | None = None,
        num_before: Int[Array, "b"] | None = None,
        max_chunks: int | None = None,
    ) -> "Partition":
        """Gives the first `num_slots` boundaries of each row a slot, in order.

        Which boundaries stay depends on earlier tokens alone, so training and decoding agree. A token whose own
        segment has no chunk yet (its first boundary overflowed) reads no slot, never another segment's.

        Args:
          last_segment: the segment that each row was in after earlier calls; None: rows begin here.
          num_before: chunks that earlier calls began in that segment.
          max_chunks: chunks that a segment may begin in all, those before included; None = no limit.
        Raises:
          ValueError: num_slots is not in 1 .. t.
        """
        num_rows, length = boundary_mask.shape
        if not 1 <= num_slots <= length:
            raise ValueError(f"num_slots {num_slots} must be between 1 and the {length} tokens of a row")
        may_start = boundary_mask = boundary_mask & (segment_ids != 0)
        if max_chunks is not None and num_before is not None and last_segment is not None:
            count, _ = count_in_segment(boundary_mask, segment_ids, num_before, last_segment)
            may_start = boundary_mask & (count <= max_chunks)
        rank = jnp.cumsum(may_start, axis=1, dtype=jnp.int32) - 1
        starts_chunk = may_start & (rank < num_slots)

        row = jnp.arange(num_rows)[:, None]
        target = jnp.where(starts_chunk, rank, num_slots)  # one past the end is dropped
        index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), boundary_mask.shape)
        first_token = jnp.full((num_rows, num_slots), length, jnp.int32).at[row, target].set(index, mode="drop")
        chunk_ids = jnp.take_along_axis(segment_ids, first_token, axis=1, mode="fill", fill_value=0)

        last = jnp.minimum(rank, num_slots - 1)
        own_id = jnp.take_along_axis(chunk_ids, jnp.maximum(last, 0), axis=1)
        may_read = (own_id == segment_ids) & (segment_ids != 0) & (last >= 0)
        return cls(
            segment_ids=segment_ids, starts_chunk=starts_chunk, slot=jnp.where(may_read, last, num_slots),
            first_token=first_token, chunk_segment_ids=chunk_ids,
            num_overflow=jnp.sum(boundary_mask & ~starts_chunk, axis=1, dtype=jnp.int32),
            carried_segment=_no_segment(segment_ids) if last_segment is None else
            carried_segment(segment_ids, last_segment))

    @classmethod
    @typed
    def fixed(
        cls, segment_ids: Int[Array, "b t"], chunk_length: int, num_slots: int | None = None
    ) -> "Partition":
        """Starts a chunk at every `chunk_length`-th token of each segment.

        Args:
          num_slots: None = one per token: ceil(t / chunk_length) may be too few for a row of several segments.
        """
        starts = segment_positions(segment_ids) % chunk_length == 0
        return cls.from_boundaries(starts, segment_ids, num_slots or segment_ids.shape[1])

    @classmethod
    @typed
    def blocks(cls, segment_ids: Int[Array, "b t"], block: int) -> "Partition":
        """Cuts rows every `block` tokens, whatever segments they hold: slot j is that of block j.

        To the partition, the real tokens of a row are one segment; the slot of a block of padding is empty.
        """
        num_rows, length = segment_ids.shape
        num_slots = -(-length // block)
        is_real = segment_ids != 0
        by_block = jnp.pad(is_real, ((0, 0), (0, -length % block))).reshape(num_rows, num_slots, block)
        holds_any = jnp.any(by_block, axis=2)
        first = jnp.arange(num_slots) * block + jnp.argmax(by_block, axis=2)
        first = jnp.where(holds_any, first, length).astype(jnp.int32)
        index = jnp.arange(length, dtype=jnp.int32)
        slot = jnp.where(is_real, index // block, num_slots)
        return cls(
            segment_ids=is_real.astype(jnp.int32), slot=slot, first_token=first,
            starts_chunk=jnp.repeat(first, block, axis=1)[:, :length] == index,
            chunk_segment_ids=holds_any.astype(jnp.int32), num_overflow=_no_segment(segment_ids),
            carried_segment=_no_segment(segment_ids), block=block)

    @classmethod
    @typed
    def from_scores(
        cls,
        scores: Float[Array, "b t"],
        segment_ids: Int[Array, "b t"],
        num_slots: int,
        *,
        min_distance: int = 1,
        threshold: Scalar | None = None,
    ) -> "Partition":
        """Starts chunks at the highest scores of each row that are not too close to a higher one.

        Greedy, from the highest on: each boundary suppresses those of its segment less than `min_distance` tokens
        away. The first token of a segment always starts a chunk, and suppresses first. Of equal scores the earlier
        token wins. Which tokens start a chunk depends on the whole row: this is not causal.

        Args:
          num_slots: chunks that a row may have, those at the starts of segments included.
          threshold: lower scores start nothing; neither does -inf.
        """
        starts = segment_starts(segment_ids)
        scores = jax.lax.stop_gradient(scores)
        may_start = (segment_ids != 0) & (segment_positions(segment_ids) >= min_distance)
        if threshold is not None:
            may_start &= scores >= threshold
        index = jnp.arange(scores.shape[1])
        row = jnp.arange(scores.shape[0])

        def take_best(_, carry):
            chosen, open_scores = carry
            best = jnp.argmax(open_scores, axis=1)
            is_taken = (open_scores[row, best] > -jnp.inf) & (jnp.sum(chosen, axis=1) < num_slots)
            is_near = jnp.abs(index - best[:, None]) < min_distance
            is_near &= segment_ids == segment_ids[row, best][:, None]
            chosen = chosen | (is_taken[:, None] & (index == best[:, None]))
            return chosen, jnp.where(is_near, -jnp.inf, open_scores)

        carry = starts, jnp.where(may_start, scores, -jnp.inf)
        chosen, _ = jax.lax.fori_loop(0, num_slots, take_best, carry)
        return cls.from_boundaries(chosen, segment_ids, num_slots)

    @classmethod
    @typed
    def from_ids(
        cls, chunk_ids: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None = None,
        num_slots: int | None = None,
    ) -> "Partition":
        """Starts a chunk wherever the id differs from that of the token before, and at each segment's start.

        Args:
          chunk_ids: one chunk per run of equal ids; 0 = in no chunk, as padding.
          segment_ids: None: each row is one segment.
          num_slots: None = one per token.
        """
        segment_ids = jnp.ones_like(chunk_ids) if segment_ids is None else segment_ids
        segment_ids = jnp.where(chunk_ids != 0, segment_ids, 0)
        starts = segment_starts(chunk_ids) | segment_starts(segment_ids)
        return cls.from_boundaries(starts, segment_ids, num_slots or chunk_ids.shape[1])

    @property
    def num_slots(self) -> int:
        return self.first_token.shape[1]

    @property
    def is_chunk(self) -> jax.Array:
        """[b, c] bool: True = the slot holds a chunk."""
        return self.chunk_segment_ids != 0

    @property
    def is_carried(self) -> jax.Array:
        """[b, t] bool: True = the token belongs to the chunk that its row came in with."""
        is_inside = (self.segment_ids == self.carried_segment[:, None]) & (self.segment_ids != 0)
        return is_inside & (self.slot == self.num_slots)

    @property
    def place(self) -> jax.Array:
        """[b, t] int32: the chunk of each token among c + 1: 0, the carried one; 1 + slot; c + 1 for no chunk."""
        return jnp.where(self.is_carried, 0, self.slot + 1)

    @property
    def last_place(self) -> jax.Array:
        """[b] int32: the place, as in `place`, that each row ends in; a row of padding stays in chunk 0."""
        is_read = jnp.any(self.segment_ids != 0, axis=1)
        return jnp.where(is_read, last_real(self.place, self.segment_ids), 0)

    @property
    def begins_segment(self) -> jax.Array:
        """[b, c] bool: True = the first chunk of its segment, in any call."""
        return segment_starts(self.chunk_segment_ids, self.carried_segment)


def _no_segment(segment_ids: jax.Array) -> jax.Array:
    return jnp.zeros(segment_ids.shape[0], jnp.int32)


@typed
def pack_segments(segment_ids: Int[Array, "b t"], num_buffers: int) -> Int[Array, "n l"]:
    """Numbers the segments of `num_buffers` buffers, each of which holds equally many rows one after the other.

    Segments of different rows get different ids; see `pack_rows`.
    """
    row = jnp.arange(segment_ids.shape[0], dtype=jnp.int32)[:, None]
    unique = row * segment_ids.shape[1] + segment_ordinals(segment_ids)
    return jnp.where(segment_ids != 0, unique, 0).reshape(num_buffers, -1)
