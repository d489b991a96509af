"""The state of an H-Net between tokens: one pytree, level within level, with its own length for every row."""
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from hnet.config import HNetConfig, num_slots
from hnet.routers import make_router
from hnet.stack_state import StackState, apply_updates, empty_state, empty_updates
from layers import PoolState, count_in_segment, last_segment


@struct.dataclass
class StageState:
    """A stage and everything inside it. The fields past `encoder` are None at the innermost stage."""

    encoder: StackState                          # or, in what a stage returns, the updates of its layers
    router: Any = None                           # from the empty_state of its router
    pool: PoolState | None = None                # tokens of the chunk each row is in, for pooled downsampling
    chunk_value: jax.Array | None = None         # [b, d] float32: what that chunk contributes to its tokens
    token_value: jax.Array | None = None         # [b, d] float32: the average over tokens, for "smooth_tokens"
    last_segment: jax.Array | None = None        # [b] int32: the segment each row is in; 0 before the first token
    num_chunks: jax.Array | None = None          # [b] int32: chunks begun so far in that segment
    chunk_length: jax.Array | None = None        # [b] int32: tokens of the chunk each row is in, if embedded
    decoder: StackState | None = None
    inner: "StageState | None" = None
    max_chunks: int = struct.field(pytree_node=False, default=0)  # that a segment may begin in all

    def next(self, segment_ids: jax.Array, starts_chunk: jax.Array, **fields: Any) -> "StageState":
        """Returns the state after tokens [b, t]: `fields` are replaced, and chunks and segments counted on."""
        _, num_chunks = count_in_segment(starts_chunk, segment_ids, self.num_chunks, self.last_segment)
        return self.replace(
            num_chunks=num_chunks, last_segment=last_segment(segment_ids, self.last_segment), **fields)


@struct.dataclass
class BoundaryState:
    """The state of the router "entropy"."""

    lm: "DecodeState"
    entropy: jax.Array  # [b] float32: of the byte that comes next, in nats


@struct.dataclass
class DecodeState:
    """The state of every row of a batch. Rows are independent: each has its own length at every stage."""

    stage: StageState
    num_tokens: jax.Array                                  # [b] int32: tokens read of its segment
    boundary: BoundaryState | None = None
    max_length: int = struct.field(pytree_node=False, default=0)  # tokens a segment has room for


def init_decode_state(config: HNetConfig, batch: int, max_length: int) -> DecodeState:
    """Makes the state before the first token of `batch` rows.

    Args:
      max_length: tokens that a segment may grow to; past it, its logits are NaN. Where boundaries past a stage's
        capacity are merged, they are those of a row of this length: the length of training gives its model.
    Raises:
      ValueError: the batch or the length is below 1.
    """
    if batch < 1 or max_length < 1:
        raise ValueError(f"a decode state needs at least 1 row of 1 token, not {batch} of {max_length}")
    dtype = config.compute_dtype

    def of_stage(index: int, length: int, slots: int) -> StageState:
        """Makes the state of a stage for `length` tokens, for which a row of training has `slots`."""
        stage = config.stages[index]
        chunking, width = stage.chunking, stage.stack.width
        encoder = empty_state(stage.encoder, stage.stack, batch, length, dtype)
        if not stage.decoder:
            return StageState(encoder)
        inner_slots = slots if chunking.overflow == "grow" else num_slots(chunking.capacity, slots)
        num_chunks = inner_slots if chunking.overflow == "merge" else length
        value = jnp.zeros((batch, width), jnp.float32)
        return StageState(
            encoder,
            router=make_router(chunking).empty_state(batch, width),
            pool=None if chunking.downsampler == "first" else PoolState.empty(
                chunking.downsampler, (batch, width)),
            chunk_value=value,
            token_value=value if chunking.upsampler == "smooth_tokens" else None,
            num_chunks=jnp.zeros(batch, jnp.int32),
            last_segment=jnp.zeros(batch, jnp.int32),
            chunk_length=jnp.zeros(batch, jnp.int32) if chunking.length_embedding else None,
            decoder=empty_state(stage.decoder, stage.stack, batch, length, dtype),
            inner=of_stage(index + 1, num_chunks, inner_slots),
            max_chunks=num_chunks,
        )

    boundary = None
    if config.boundary_lm is not None:
        lm = init_decode_state(config.boundary_lm, batch, max_length)
        boundary = BoundaryState(lm, jnp.zeros(batch, jnp.float32))
    return DecodeState(of_stage(0, max_length, max_length), jnp.zeros(batch, jnp.int32), boundary, max_length)


def decode_state_bytes(config: HNetConfig, batch: int, max_length: int) -> int:
    """Counts the bytes of the state that `init_decode_state` makes, without making it."""
    state = jax.eval_shape(lambda: init_decode_state(config, batch, max_length))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def advance(config: HNetConfig, before: StageState, after: StageState, index: int = 0) -> StageState:
    """Returns the state of stage `index` after a call: its layers' updates applied, the rest as it came back."""
    stage = config.stages[index]

    def applied(layout: str, old: StackState, update: StackState) -> StackState:
        return apply_updates(layout, stage.stack, config.compute_dtype, old, update)

    after = after.replace(encoder=applied(stage.encoder, before.encoder, after.encoder))
    if not stage.decoder:
        return after
    return after.replace(
        decoder=applied(stage.decoder, before.decoder, after.decoder),
        inner=advance(config, before.inner, after.inner, index + 1))


def unchanged(config: HNetConfig, state: StageState, index: int) -> StageState:
    """Makes the result of stage `index` for a call in which every row is one padding token."""
    stage = config.stages[index]

    def empty(layout: str, old: StackState) -> StackState:
        return empty_updates(layout, stage.stack, config.compute_dtype, old)

    state = state.replace(encoder=empty(stage.encoder, state.encoder))
    if not stage.decoder:
        return state
    return state.replace(
        decoder=empty(stage.decoder, state.decoder), inner=unchanged(config, state.inner, index + 1))
