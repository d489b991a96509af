"""State of an H-Net between tokens: one pytree, level within level, with its own length for every row."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from hnet.config import HNetConfig, num_slots
from hnet.routers import make_router
from hnet.stack import MixerState, MixerUpdate, empty_state
from layers import KeepAll, KVCache, PoolState, empty_update


@struct.dataclass
class StageState:
    """A stage and everything inside it. The fields past `encoder` are None at the innermost stage."""

    encoder: tuple[MixerState | MixerUpdate, ...]
    router: Any = None                           # what its router's empty_state made
    pool: PoolState | None = None                # tokens of the chunk each row is in, for pooled downsampling
    chunk_value: jax.Array | None = None         # [b, d] float32: what that chunk contributes to its tokens
    token_value: jax.Array | None = None         # [b, d] float32: the average over tokens, for "smooth_tokens"
    num_chunks: jax.Array | None = None          # [b] int32: chunks begun so far
    last_segment: jax.Array | None = None        # [b] int32: the segment each row is in; 0 before the first token
    decoder: tuple[MixerState | MixerUpdate, ...] | None = None
    inner: "StageState | None" = None
    max_chunks: int = struct.field(pytree_node=False, default=0)  # that a row may begin in all


@struct.dataclass
class BoundaryState:
    """State of the router "entropy"."""

    lm: "DecodeState"
    entropy: jax.Array  # [b] float32: of the byte that comes next, in nats


@struct.dataclass
class DecodeState:
    """State of a batch. Rows are independent: each has its own number of tokens at every stage."""

    stage: StageState
    num_tokens: jax.Array                                  # [b] int32: tokens read
    boundary: BoundaryState | None = None
    max_length: int = struct.field(pytree_node=False, default=0)  # tokens a row has room for


def init_decode_state(config: HNetConfig, batch: int, max_length: int) -> DecodeState:
    """The state before the first token of `batch` rows.

    Args:
      max_length: tokens that a row may grow to; past it, its logits are NaN. Where boundaries past a stage's
        capacity are merged, they are those of a row of this length: the length of training gives its model.
    Raises:
      ValueError: the batch or the length is below 1.
    """
    if batch < 1 or max_length < 1:
        raise ValueError(f"a decode state needs at least 1 row of 1 token, not {batch} of {max_length}")
    dtype = config.compute_dtype

    def of_stage(index: int, length: int, slots: int) -> StageState:
        """`length` tokens may come; a row of training has `slots` for them, of which "merge" fills a part."""
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
            decoder=empty_state(stage.decoder, stage.stack, batch, length, dtype),
            inner=of_stage(index + 1, num_chunks, inner_slots),
            max_chunks=num_chunks,
        )

    boundary = None
    if config.boundary_lm is not None:
        lm = init_decode_state(config.boundary_lm, batch, max_length)
        boundary = BoundaryState(lm, jnp.zeros(batch, jnp.float32))
    return DecodeState(of_stage(0, max_length, max_length), jnp.zeros(batch, jnp.int32), boundary, max_length)


def advance(before: StageState, after: StageState) -> StageState:
    """Applies what a stage returned: its caches grow by their updates, everything else is as it came back."""
    def one(old, new):
        return jax.vmap(KeepAll().append)(old, new) if isinstance(old, KVCache) else new  # layers are stacked

    return jax.tree.map(one, before, after, is_leaf=_is_cache)


def unchanged(state: StageState) -> StageState:
    """Makes the update of a stage that has read one padding token per row."""
    def one(old):
        return jax.vmap(empty_update)(old) if isinstance(old, KVCache) else old

    return jax.tree.map(one, state, is_leaf=_is_cache)


def _is_cache(node: Any) -> bool:
    return isinstance(node, KVCache)
