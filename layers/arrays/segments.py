"""Arithmetic on segment ids: where segments start, and positions inside them.

Ids are as `array_types` defines them: 0 is padding, non-zero ids are contiguous and unique in a row.
"""
import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Int, Shaped, typed


@typed
def segment_starts(segment_ids: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    """True at the first token of every segment, never at padding."""
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    return (segment_ids != 0) & (segment_ids != previous)


@typed
def segment_positions(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Counts 0, 1, 2, ... from the start of each segment."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(segment_starts(segment_ids), index, 0), axis=1)
    return index - start


@typed
def last_real(x: Shaped[Array, "b t *d"], segment_ids: Int[Array, "b t"]) -> Shaped[Array, "b *d"]:
    """The entry of `x` at the last token that is not padding; the first entry of a row of padding."""
    index = jnp.max(jnp.where(segment_ids != 0, jnp.arange(segment_ids.shape[1]), 0), axis=1)
    return x[jnp.arange(x.shape[0]), index]


@typed
def segment_ordinals(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Numbers the segments of a row 1, 2, 3, ...; padding takes the number of the segment before it.

    The numbers never decrease, and padding ahead of everything is 1, so a state carried into the row
    (ordinal 1) reaches exactly the first segment.
    """
    return jnp.maximum(jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32), 1)
