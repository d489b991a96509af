"""The way into the stage within and back: chunks in as many slots as the stage has, or needs.

  make_chunks        each chunk gets a slot and a vector
  run_main_network   the stage within runs on the slots
  dechunk            each token gets the value of its chunk      (`layers.dechunk`)
  run_inner_stage    does these three with the slots that the stage has

The number of slots is static. A stage with overflow "grow" compiles the whole way for several numbers and
takes the smallest that fits the fullest row of the batch, on all devices alike.
"""
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hnet.config import ChunkingConfig, num_slots
from hnet.decode_state import StageState, unchanged
from hnet.stage_output import StageOutput
from layers import Partition, RouterHints, chunk, chunk_lengths, chunk_pooled, pack_rows, pack_segments


class RoutedTokens(NamedTuple):
    """Tokens of a stage and the boundaries among them, for rows or for buffers that rows share."""

    h: jax.Array                             # [b, t, d]
    segment_ids: jax.Array                   # [b, t]
    boundary_prob: jax.Array                 # [b, t] float32
    boundary_levels: jax.Array | None = None  # [b, t], see `RouterHints`
    scores: jax.Array | None = None          # [b, t], for attention pooling

    def pack(self, num_buffers: int) -> "RoutedTokens":
        """Lays rows one after the other into `num_buffers` buffers; segments of different rows stay apart."""
        packed = jax.tree.map(partial(pack_rows, num_buffers=num_buffers), self)
        return packed._replace(h=constrain(packed.h), segment_ids=pack_segments(self.segment_ids, num_buffers))


class Chunks(NamedTuple):
    """Inputs of the stage within, and what a state keeps of the chunk that each row ends in."""

    vectors: jax.Array  # [b, c, d]
    partition: Partition
    hints: RouterHints
    carried: dict[str, Any]  # by field of `StageState`


class InnerOutput(NamedTuple):
    """The values that came back, for rows of t tokens, and what the stage within says of itself."""

    values: jax.Array               # [b, t, d] float32: of the chunk that each token is in
    starts_chunk: jax.Array         # [b, t] bool: boundaries that got a slot
    num_slots: jax.Array            # int32: per row, or per buffer
    stages: dict[str, StageOutput]  # of the stages inside
    carried: dict[str, Any]         # by field of `StageState`


Inside = Callable[[nn.Module, RoutedTokens, int], InnerOutput]  # with that many slots


def run_inner_stage(
    inside: Inside, inner: nn.Module, tokens: RoutedTokens, chunking: ChunkingConfig, state: StageState | None
) -> InnerOutput:
    """Runs `inside` on tokens, packed if the stage says so, with as many slots as it has or needs."""
    num_rows, length = tokens.segment_ids.shape
    if state is not None:  # rows of their own, with room for what their caches hold
        return inside(inner, tokens, min(length, state.max_chunks))

    if chunking.packed:
        tokens = tokens.pack(math.gcd(num_rows, _num_batch_shards()))
    fractions = (chunking.capacity, *chunking.grow_to) if chunking.grows else (chunking.capacity,)
    sizes = [num_slots(fraction, tokens.segment_ids.shape[1]) for fraction in fractions]
    if len(sizes) == 1 or inner.is_initializing():
        output = inside(inner, tokens, sizes[-1])
    else:
        num_boundaries = jnp.sum((tokens.boundary_prob > 0.5) & (tokens.segment_ids != 0), axis=1)
        smallest = jnp.sum(jnp.max(num_boundaries) > jnp.array(sizes[:-1]))
        # Each branch is computed again in the backward pass, which would otherwise keep the intermediates of all.
        branches = [nn.remat(_branch(inside, size), prevent_cse=False) for size in sizes]
        output = nn.switch(smallest, branches, inner, tokens)
    return output._replace(values=constrain(output.values.reshape(num_rows, length, -1)),
                           starts_chunk=output.starts_chunk.reshape(num_rows, length))


def _branch(inside: Inside, size: int) -> Callable[[nn.Module, RoutedTokens], InnerOutput]:
    """Fixes `size` slots and pads results to shapes that do not depend on them."""
    def branch(inner, tokens):
        output = inside(inner, tokens, size)
        # Where rows within share buffers there are fewer of them, for as many tokens.
        num_tokens = tokens.segment_ids.size
        stages = {name: stage.padded_to(num_tokens // stage.is_real.shape[0])
                  for name, stage in output.stages.items()}
        return output._replace(stages=stages)

    return branch


def make_chunks(
    chunking: ChunkingConfig, tokens: RoutedTokens, size: int, before: StageState,
    length_embedding: jax.Array | None = None,
) -> Chunks:
    """Gives each chunk one of `size` slots, and a vector.

    Args:
      before: with fields of None where rows begin here.
      length_embedding: [n, d], a vector for 0, 1, ..., n - 1 or more tokens in the chunk before, added to a chunk;
        0 is for the first of a segment. A chunk's own length would tell its first token the future.
    """
    partition = Partition.from_boundaries(
        tokens.boundary_prob > 0.5, tokens.segment_ids, size, last_segment=before.last_segment,
        num_before=before.num_chunks, max_chunks=before.max_chunks or None)
    carried = {}
    if chunking.downsampler == "first":
        vectors = chunk(tokens.h, partition)
    else:
        vectors, carried["pool"] = chunk_pooled(
            tokens.h, partition, chunking.downsampler, scores=tokens.scores, state=before.pool)
    if length_embedding is not None:
        lengths = chunk_lengths(partition, before.chunk_length)
        carried["chunk_length"] = jnp.take_along_axis(
            lengths, partition.last_place[:, None], axis=1, mode="fill", fill_value=0)[:, 0]
        lengths = jnp.where(partition.begins_segment, 0, lengths[:, :-1])
        bucket = jnp.minimum(lengths, length_embedding.shape[0] - 1)
        vectors = vectors + length_embedding[bucket].astype(vectors.dtype)
    levels = tokens.boundary_levels
    if levels is not None:
        levels = jnp.maximum(chunk(levels, partition) - 1, 0)
    return Chunks(constrain(vectors), partition, RouterHints(boundary_levels=levels), carried)


def run_main_network(
    inner: nn.Module, chunks: Chunks, state: StageState | None
) -> tuple[jax.Array, dict[str, StageOutput], StageState | None]:
    """Runs the stage within; while decoding single tokens only if some row has a chunk for it."""
    operands = chunks.vectors, chunks.partition.chunk_segment_ids, chunks.hints, state
    if state is None or chunks.vectors.shape[1] > 1:
        return inner(*operands)

    def run(inner, *operands):
        return inner(*operands)

    def skip(inner, vectors, segment_ids, hints, state):
        names = [f"stage{index}" for index in range(inner.index, len(inner.config.stages) - 1)]
        stages = {name: StageOutput.of_padding(vectors.shape[0]) for name in names}
        return jnp.zeros_like(vectors), stages, unchanged(inner.config, state, inner.index)

    return nn.cond(jnp.any(chunks.partition.is_chunk), run, skip, inner, *operands)


def _num_batch_shards() -> int:
    """Counts the parts that the mesh splits the rows of a batch into; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = nn.logical_to_mesh_axes(("activation_batch",))
    axes = spec[0] if spec else None
    if mesh.empty or axes is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def constrain(x: jax.Array) -> jax.Array:
    """Tells the mesh, where there is one, that x [b, t, d] are activations."""
    return nn.with_logical_constraint(x, ("activation_batch", "activation_length", "activation_embed"))
