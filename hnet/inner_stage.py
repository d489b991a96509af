"""The way into the inner stages and back: chunks in as many slots as the stage has, or needs.

  down   each chunk gets a slot and a vector          `Partition`, `chunk` or `chunk_pooled`
  in     the inner stage runs on the slots
  up     each token gets the value of its chunk       `dechunk`

How many slots there are is static. A stage with overflow "grow" compiles the whole way for several numbers and
takes the smallest that fits the fullest row of the batch, on all devices alike.
"""
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hnet.config import ChunkingConfig, HNetConfig, num_slots
from hnet.decode_state import StageState, unchanged
from hnet.stage_output import StageOutput
from layers import (
    Partition,
    PoolState,
    RouterHints,
    carried_segment,
    chunk,
    chunk_pooled,
    dechunk,
    pack_rows,
    pack_segments,
)

Inner = Callable[..., tuple[jax.Array, dict[str, StageOutput], StageState | None]]


class Chunked(NamedTuple):
    """Results of an inner stage, for rows of t tokens."""

    values: jax.Array              # [b, t, d] float32: of the chunk that each token is in
    starts_chunk: jax.Array        # [b, t] bool: boundaries that got a slot
    capacity: jax.Array            # int32: slots per row, or per buffer
    stages: dict[str, StageOutput]  # of the stages inside
    pool: PoolState | None
    chunk_value: jax.Array         # [b, d]
    inner: StageState | None


def through_chunks(
    inner: nn.Module,
    config: HNetConfig,
    h: jax.Array,
    boundary_prob: jax.Array,
    segment_ids: jax.Array,
    boundary_levels: jax.Array | None,
    state: StageState | None,
) -> Chunked:
    """Runs `inner` on the chunks of h [b, t, d] that `boundary_prob` [b, t] begins."""
    chunking = config.stages[inner.index - 1].chunking
    run = partial(_at_capacity, chunking=chunking, rounded=config.bfloat16_dechunk)
    if state is not None:  # rows of their own, with room for what their caches hold
        size = min(h.shape[1], state.max_chunks)
        return run(inner, h, boundary_prob, segment_ids, boundary_levels, state, size=size)

    rows, length = segment_ids.shape
    if chunking.packed:
        num_buffers = math.gcd(rows, _num_batch_shards())
        pack = partial(pack_rows, num_buffers=num_buffers)
        h, boundary_prob = constrain(pack(h)), pack(boundary_prob)
        boundary_levels = None if boundary_levels is None else pack(boundary_levels)
        segment_ids = pack_segments(segment_ids, num_buffers)
    capacities = (chunking.capacity, *chunking.grow_to) if chunking.grows else (chunking.capacity,)
    sizes = [num_slots(capacity, segment_ids.shape[1]) for capacity in capacities]
    operands = (h, boundary_prob, segment_ids, boundary_levels)
    if len(sizes) == 1 or inner.is_initializing():
        result = run(inner, *operands, None, size=sizes[-1])
    else:
        fullest = jnp.max(jnp.sum((boundary_prob > 0.5) & (segment_ids != 0), axis=1))
        which = jnp.sum(fullest > jnp.array(sizes[:-1]))
        # Each way is computed again in the backward pass, which would else keep the intermediates of all.
        ways = [nn.remat(_way(run, size), prevent_cse=False) for size in sizes]
        result = nn.switch(which, ways, inner, *operands)
    return result._replace(
        values=constrain(result.values.reshape(rows, length, -1)),
        starts_chunk=result.starts_chunk.reshape(rows, length))


def _way(run: Callable[..., Chunked], size: int) -> Callable[..., Chunked]:
    """`run` with `size` slots, and results whose shapes do not depend on that."""
    def way(inner, h, boundary_prob, segment_ids, boundary_levels):
        result = run(inner, h, boundary_prob, segment_ids, boundary_levels, None, size=size)
        # Where rows within share buffers there are fewer of them, for as many tokens.
        stages = {name: stage.padded_to(h.shape[0] * h.shape[1] // stage.boundary_mask.shape[0])
                  for name, stage in result.stages.items()}
        return result._replace(stages=stages)

    return way


def _at_capacity(
    inner: nn.Module, h: jax.Array, boundary_prob: jax.Array, segment_ids: jax.Array,
    boundary_levels: jax.Array | None, state: StageState | None, *, chunking: ChunkingConfig, rounded: bool,
    size: int,
) -> Chunked:
    before = StageState(None) if state is None else state
    partition = Partition.from_boundaries(
        boundary_prob > 0.5, segment_ids, size, last_segment=before.last_segment,
        num_before=_num_before(before, segment_ids), max_chunks=None if state is None else state.max_chunks)
    pool = None
    if chunking.downsampler == "first":
        chunks = chunk(h, partition)
    else:
        chunks, pool = chunk_pooled(h, partition, chunking.downsampler, state=before.pool)
    if boundary_levels is not None:
        boundary_levels = jnp.maximum(chunk(boundary_levels, partition) - 1, 0)
    hints = RouterHints(boundary_levels=boundary_levels)
    z, stages, inner_state = _run_inner(inner, constrain(chunks), partition.chunk_segment_ids, hints, before.inner)
    values, chunk_value = dechunk(
        z, boundary_prob, partition, smoothing=chunking.upsampler == "smooth", initial_value=before.chunk_value,
        round_to_bfloat16=rounded)
    return Chunked(values, partition.starts_chunk, jnp.int32(size), stages, pool, chunk_value, inner_state)


def _num_before(state: StageState, segment_ids: jax.Array) -> jax.Array | None:
    """Chunks that earlier calls began in the segment that each row continues; 0 where it begins another."""
    if state.num_chunks is None:
        return None
    return jnp.where(carried_segment(segment_ids, state.last_segment) != 0, state.num_chunks, 0)


def _run_inner(
    inner: Inner, chunks: jax.Array, segment_ids: jax.Array, hints: RouterHints, state: StageState | None
) -> tuple[jax.Array, dict[str, StageOutput], StageState | None]:
    """Runs the stage within; while decoding single tokens only if some row has a chunk for it."""
    if state is None or chunks.shape[1] > 1:
        return inner(chunks, segment_ids, hints, state)

    def skip(inner, chunks, segment_ids, hints, state):
        names = [f"stage{index}" for index in range(inner.index, len(inner.config.stages) - 1)]
        stages = {name: StageOutput.of_padding(chunks.shape[0]) for name in names}
        return jnp.zeros_like(chunks), stages, unchanged(inner.config, state, inner.index)

    def run(inner, *arguments):
        return inner(*arguments)

    return nn.cond(jnp.any(segment_ids != 0), run, skip, inner, chunks, segment_ids, hints, state)


def _num_batch_shards() -> int:
    """Parts that the mesh splits the rows of a batch into; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = nn.logical_to_mesh_axes(("activation_batch",))
    axes = spec[0] if spec else None
    if mesh.empty or axes is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def constrain(x: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x, ("activation_batch", "activation_length", "activation_embed"))
