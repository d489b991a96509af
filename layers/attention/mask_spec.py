"""What a query may see among the keys of its blocks, and how scores become weights."""
import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Int, typed

SELECT_BITS = 32  # key blocks per word of `row_select`


@partial(
    jax.tree_util.register_dataclass,
    meta_fields=["causal", "window", "softcap", "scale"],
    data_fields=["offset", "positions", "kv_positions", "segment_ids", "kv_segment_ids", "row_select", "sinks"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """A query sees a key if all of these allow it, and the block lists name the block of the key.

    Attributes:
      causal: only keys at the query's position or before it.
      window: only keys at most `window` positions away: i - window .. i where causal, window + 1 of them.
      softcap: scores x become softcap * tanh(x / softcap).
      scale: factor of q . k; None means 1 / sqrt(width).
      offset: query i is at position i + offset, an int or [b]; key j at position j.
      positions, kv_positions: [b, t] and [b, s] int32, instead of those. None for the keys: those of the
        queries, if given.
      segment_ids, kv_segment_ids: [b, t] and [b, s] int32, only keys of the query's segment; 0 is padding, which
        neither sees nor is seen. None for the keys: those of the queries.
      row_select: [b, m, ceil(s / block_k / 32), t] int32, for each query a bit per key block that it may see,
        from `pack_row_select`; the same m as the lists, or 1.
      sinks: [h] float, per query head the logit of a key that has no value.
    """

    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    offset: int | jax.Array = 0
    positions: jax.Array | None = None
    kv_positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    kv_segment_ids: jax.Array | None = None
    row_select: jax.Array | None = None
    sinks: jax.Array | None = None

    def check(self) -> None:
        """Raises ValueError for a number that no mask has."""
        if self.window is not None and self.window < 0:
            raise ValueError(f"window {self.window} must be None (unlimited) or how far from a query keys may be")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap {self.softcap} must be None or above 0")

    def is_static(self) -> bool:
        """Whether the mask depends on positions known before the program runs, and on nothing else."""
        arrays = (self.positions, self.kv_positions, self.segment_ids, self.kv_segment_ids)
        return isinstance(self.offset, int) and all(array is None for array in arrays)


class TokenRows(NamedTuple):
    """Position and segment of every query and every key, of one batch row or of all."""

    of_queries: jax.Array  # [b or 1, 2, t] int32
    of_keys: jax.Array     # [b or 1, 2, s] int32


def token_rows(spec: MaskSpec, num_queries: int, num_keys: int) -> TokenRows:
    """Spells out what `spec` leaves to its defaults.

    Raises:
      ValueError: an array has another length than the queries or keys it describes.
    """
    def given(name: str, array: jax.Array | None, length: int) -> jax.Array | None:
        if array is not None and (array.ndim != 2 or array.shape[1] != length):
            raise ValueError(f"mask.{name} has shape {list(array.shape)}; [b, {length}] fits")
        return array

    def of_both(name: str) -> tuple[jax.Array | None, jax.Array | None]:
        queries, keys = getattr(spec, name), getattr(spec, f"kv_{name}")
        if keys is None and queries is not None and num_queries != num_keys:
            raise ValueError(f"mask.{name} is given for {num_queries} queries; give mask.kv_{name} for the "
                             f"{num_keys} keys too")
        keys = queries if keys is None else keys
        return given(name, queries, num_queries), given(f"kv_{name}", keys, num_keys)

    q_positions, kv_positions = of_both("positions")
    if q_positions is None:
        q_positions = jnp.arange(num_queries) + jnp.reshape(jnp.asarray(spec.offset), (-1, 1))
    if kv_positions is None:
        kv_positions = jnp.arange(num_keys)[None]
    q_segments, kv_segments = of_both("segment_ids")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("mask.kv_segment_ids is given without mask.segment_ids; give both")
    q_segments = jnp.ones((1, num_queries), jnp.int32) if q_segments is None else q_segments
    kv_segments = jnp.ones((1, num_keys), jnp.int32) if kv_segments is None else kv_segments

    def rows(positions: jax.Array, segments: jax.Array) -> jax.Array:
        shape = jnp.broadcast_shapes(positions.shape, segments.shape)
        both = [jnp.broadcast_to(each, shape).astype(jnp.int32) for each in (positions, segments)]
        return jnp.stack(both, axis=1)

    return TokenRows(rows(q_positions, q_segments), rows(kv_positions, kv_segments))


def may_attend(
    q_position: jax.Array, q_segment: jax.Array, kv_position: jax.Array, kv_segment: jax.Array,
    *, causal: bool, window: int | None,
) -> jax.Array:
    """The predicate on integers, broadcast against each other, that every implementation evaluates."""
    allowed = (q_segment == kv_segment) & (q_segment != 0)
    distance = q_position - kv_position
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= distance <= window
        if not causal:
            allowed &= distance >= -window
    return allowed


class BlockBounds(NamedTuple):
    """What is known of the tokens in a block without looking at each: [b, blocks], int32 and one bool."""

    first_position: jax.Array
    last_position: jax.Array
    first_segment: jax.Array
    last_segment: jax.Array
    has_padding: jax.Array


def block_bounds(rows: jax.Array, block: int) -> BlockBounds:
    """[b, 2, t] -> bounds over tokens that are no padding; a block of padding has empty ranges, first > last."""
    rows = pad_tokens(rows, block, axis=2)
    blocks = rows.reshape(*rows.shape[:2], -1, block)
    position, segment = blocks[:, 0], blocks[:, 1]
    largest = jnp.iinfo(jnp.int32).max
    is_real = segment != 0

    def range_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        lowest, highest = jnp.where(is_real, x, largest), jnp.where(is_real, x, -largest)
        return jnp.min(lowest, axis=-1), jnp.max(highest, axis=-1)

    return BlockBounds(*range_of(position), *range_of(segment), ~jnp.all(is_real, axis=-1))


def pad_tokens(x: jax.Array, block: int, *, axis: int) -> jax.Array:
    """Appends zeros, which are padding as segments are, up to whole blocks."""
    missing = -x.shape[axis] % block
    return x if missing == 0 else jnp.pad(x, [(0, missing if at == axis else 0) for at in range(x.ndim)])


def some_and_all(spec: MaskSpec, q: BlockBounds, kv: BlockBounds) -> tuple[jax.Array, jax.Array]:
    """Whether some query of a block may see some key of another, and whether all may see all.

    The first may be True where no pair is allowed, the second False where all are: bounds tell no more.
    """
    some = (q.first_segment <= kv.last_segment) & (kv.first_segment <= q.last_segment)
    one_segment = (q.first_segment == q.last_segment) & (kv.first_segment == kv.last_segment)
    everything = some & one_segment & ~q.has_padding & ~kv.has_padding
    is_padding = (q.first_segment > q.last_segment) | (kv.first_segment > kv.last_segment)
    # Ranges of padding alone are empty: of no use in a difference, which would overflow.
    q, kv = (jax.tree.map(lambda x: jnp.where(is_padding, jnp.zeros((), x.dtype), x), each) for each in (q, kv))
    nearest, farthest = q.first_position - kv.last_position, q.last_position - kv.first_position
    if spec.causal:
        some, everything = some & (farthest >= 0), everything & (nearest >= 0)
    if spec.window is not None:
        some, everything = some & (nearest <= spec.window), everything & (farthest <= spec.window)
        if not spec.causal:
            some, everything = some & (farthest >= -spec.window), everything & (nearest >= -spec.window)
    if spec.row_select is not None:
        everything = jnp.zeros_like(everything)
    return some & ~is_padding, everything


@typed
def pack_row_select(selected: Bool[Array, "b m t j"]) -> Int[Array, "b m w t"]:
    """Packs, for each query, which of the j key blocks it may see, into words of 32 bits: `row_select`."""
    num_words = -(-selected.shape[-1] // SELECT_BITS)
    padding = num_words * SELECT_BITS - selected.shape[-1]
    bits = jnp.pad(selected, ((0, 0), (0, 0), (0, 0), (0, padding)))
    bits = bits.reshape(*bits.shape[:-1], num_words, SELECT_BITS).astype(jnp.uint32)
    words = jnp.sum(bits << jnp.arange(SELECT_BITS, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32).swapaxes(-1, -2)


def is_selected(words: jax.Array, block: jax.Array) -> jax.Array:
    """Bit `block` mod 32 of each word, as bool; the words are those that hold the block."""
    return ((words >> (block & (SELECT_BITS - 1))) & 1) == 1


@typed
def add_sinks(
    o: Float[Array, "b t h v"], lse: Float[Array, "b h t"], sinks: Float[Array, "h"]
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """Attention as if each query saw one more key, of logit `sinks` and value 0 (arXiv 2309.17453, learned)."""
    sinks = sinks.astype(jnp.float32)[:, None]
    kept = jax.nn.sigmoid(lse - sinks)  # 0 where a query sees nothing, which then sees the sink alone
    return (o * kept.swapaxes(1, 2)[..., None]).astype(o.dtype), jnp.logaddexp(lse, sinks)
