"""One vector per chunk: sums over its tokens, and what is made of them.

  mean               sum / n of the n tokens of a chunk
  mean_sqrt_length   sum / sqrt(n): the mean, times sqrt(n), so that long chunks weigh more
  max                the highest of each feature
  first, last        one token
  attention          sum_i softmax(score)_i x_i, with a score for every token

Tokens in no chunk (padding among them) never matter, whatever they hold. Sums are float32. A chunk may continue
from call to call: `PoolState` carries the sums of the one that each row is in.
"""
import math
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.chunking.partition import Partition

SummaryKind = Literal["mean", "mean_sqrt_length", "max", "first", "last", "attention"]
_NOTHING = float(jnp.finfo(jnp.float32).min)  # below any maximum, and finite, so that gradients are


class PoolState(NamedTuple):
    """Sums over the tokens, so far, of the chunk that each row is in.

    Attributes:
      total: [b, *d] float32: what the kind keeps: sum, weighted sum, maximum, first or last token.
      count: [b] int32, tokens.
      mass, peak: [b, *e] float32, for "attention": the sum of exp(score - peak), and the highest score; else None.
    """

    total: jax.Array
    count: jax.Array
    mass: jax.Array | None = None
    peak: jax.Array | None = None

    @classmethod
    def empty(
        cls, kind: SummaryKind, shape: tuple[int, ...], score_shape: tuple[int, ...] | None = None
    ) -> "PoolState":
        """Returns the state of chunks without tokens.

        Args:
          shape: of one token per row, [b, *d].
          score_shape: of one score per row, for "attention"; None: [b].
        """
        scores = jnp.zeros(score_shape or shape[:1], jnp.float32) if kind == "attention" else None
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:1], jnp.int32), scores, scores)


@typed
def summarize(
    x: Float[Array, "b t *d"],
    partition: Partition,
    kind: SummaryKind,
    *,
    scores: Float[Array, "b t *e"] | None = None,
) -> Float[Array, "b c *d"]:
    """Summarizes the tokens of each chunk in float32; an empty slot is 0.

    Example: means of blocks of 64 keys, `summarize(k, Partition.blocks(segment_ids, 64), "mean")`.

    Args:
      scores: for "attention" alone, [b, t] or with the leading axes of x besides, such as one for each head.
    Raises:
      ValueError: "attention" lacks scores, or another kind has some.
    """
    return _finish(_sums(x, partition, kind, scores, None), kind)[:, 1:]


@typed
def summarize_next(
    x: Float[Array, "b t *d"],
    partition: Partition,
    kind: SummaryKind,
    state: PoolState,
    *,
    scores: Float[Array, "b t *e"] | None = None,
) -> tuple[Float[Array, "b c_and_1 *d"], PoolState]:
    """Summarizes rows that arrive in pieces: equal to `summarize` of all at once, for every chunk that has ended.

    Returns:
      Summaries of the chunk that each row came in with, then of those that began now, so far as their tokens have
      come; and the sums of the chunk that each row ends in.
    """
    sums = _sums(x, partition, kind, scores, state)
    return _finish(sums, kind), _sums_at_end(sums, partition)


@typed
def chunk_pooled(
    x: Float[Array, "b t d"],
    partition: Partition,
    kind: SummaryKind,
    *,
    scores: Float[Array, "b t"] | None = None,
    state: PoolState | None = None,
) -> tuple[Float[Array, "b c d"], PoolState]:
    """Fills each slot with the summary of the chunk *before*, in the same segment.

    Summarized over its own tokens, a chunk would tell the earlier ones of them about the later. So what a token
    reads covers the chunks that were complete when its own began, as in MegaByte and BLT; the first
    slot of a segment is 0. The result has the dtype of `x`.

    Args:
      scores: for "attention".
      state: sums of the chunk that each row was in after earlier calls.
    Returns:
      The slots, and the sums of the chunk that each row ends in.
    """
    state = PoolState.empty(kind, (x.shape[0], x.shape[2])) if state is None else state
    summaries, state = summarize_next(x, partition, kind, state, scores=scores)
    belongs = partition.is_chunk & ~partition.begins_segment
    return jnp.where(belongs[:, :, None], summaries[:, :-1], 0).astype(x.dtype), state


@typed
def chunk_lengths(partition: Partition, carried: Int[Array, "b"] | None = None) -> Int[Array, "b c_and_1"]:
    """Counts the tokens of the chunk that each row came in with, then of those that began now.

    Args:
      carried: tokens of the former in earlier calls; None: none.
    """
    ones = jnp.ones(partition.slot.shape, jnp.int32)
    return _reduce("sum", ones, jnp.zeros(ones.shape[:1], jnp.int32) if carried is None else carried, partition)


class PoolingScores(nn.Module):
    """Scores for attention pooling: tokens' products with one learned query, over sqrt(d).

    The query is 0 at first, so pooling begins as the mean. A key projection would add nothing to a single query.
    """

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t"]:
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
        query = self.param("query", init, (x.shape[-1],))
        return jnp.einsum("btd,d->bt", x.astype(jnp.float32), query) / math.sqrt(x.shape[-1])


def _sums(
    x: jax.Array, partition: Partition, kind: SummaryKind, scores: jax.Array | None, before: PoolState | None
) -> PoolState:
    """Sums over the tokens of c + 1 chunks a row, in the order of `Partition.place`."""
    if (scores is not None) != (kind == "attention"):
        raise ValueError(f"scores are for the kind 'attention', which needs them; the kind is {kind!r}")
    score_shape = None if scores is None else scores[:, 0].shape
    before = PoolState.empty(kind, x[:, 0].shape, score_shape) if before is None else before
    x = x.astype(jnp.float32)
    count = chunk_lengths(partition, before.count)
    if kind == "attention":
        return _weighted_sums(x, scores.astype(jnp.float32), partition, before, count)
    if kind in ("mean", "mean_sqrt_length"):
        return PoolState(_reduce("sum", x, before.total, partition), count)
    had_any = _expand(before.count > 0, before.total)
    if kind == "max":
        total = _reduce("max", x, jnp.where(had_any, before.total, _NOTHING), partition)
        return PoolState(jnp.where(_expand(count > 0, total), total, 0), count)

    index = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    index = index if kind == "last" else -index
    found = _reduce("max", index, jnp.full(x.shape[:1], -x.shape[1], jnp.int32), partition)
    token = jnp.where(found == -x.shape[1], x.shape[1], jnp.abs(found))
    total = jnp.take_along_axis(x, _expand(token, x), axis=1, mode="fill", fill_value=0)
    had_any = had_any if kind == "first" else _expand(found[:, 0] == -x.shape[1], before.total)
    return PoolState(total.at[:, 0].set(jnp.where(had_any, before.total, total[:, 0])), count)


def _weighted_sums(
    x: jax.Array, scores: jax.Array, partition: Partition, before: PoolState, count: jax.Array
) -> PoolState:
    """Sums of exp(score - peak) and of x times that; a peak that moves scales what there was."""
    is_member = _expand(partition.place <= partition.num_slots, scores)
    scores = jnp.where(is_member, scores, _NOTHING)
    had_any = _expand(before.count > 0, before.peak)
    peak = _reduce("max", scores, jnp.where(had_any, before.peak, _NOTHING), partition)
    peak = jax.lax.stop_gradient(jnp.where(_expand(count > 0, peak), peak, 0))
    own_peak = jnp.take_along_axis(peak, _expand(partition.place, peak), axis=1, mode="fill", fill_value=0)
    weights = jnp.where(is_member, jnp.exp(jnp.where(is_member, scores - own_peak, 0)), 0)
    kept = jnp.where(had_any, jnp.exp(jnp.where(had_any, before.peak - peak[:, 0], 0)), 0)
    x = jnp.where(_expand(is_member, x), x, 0)
    mass = _reduce("sum", weights, kept * before.mass, partition)
    total = _reduce("sum", _expand(weights, x) * x, _expand(kept, before.total) * before.total, partition)
    return PoolState(total, count, mass, peak)


def _finish(sums: PoolState, kind: SummaryKind) -> jax.Array:
    if kind == "mean":
        return sums.total / _expand(jnp.maximum(sums.count, 1), sums.total)
    if kind == "mean_sqrt_length":
        return sums.total / _expand(jnp.sqrt(jnp.maximum(sums.count, 1).astype(jnp.float32)), sums.total)
    if kind == "attention":
        return sums.total / _expand(jnp.where(sums.mass > 0, sums.mass, 1), sums.total)
    return sums.total


def _sums_at_end(sums: PoolState, partition: Partition) -> PoolState:
    def take(leaf):
        last = partition.last_place[:, None]
        return jnp.take_along_axis(leaf, _expand(last, leaf), axis=1, mode="fill", fill_value=0)[:, 0]

    return jax.tree.map(take, sums)


def _reduce(how: Literal["sum", "max"], values: jax.Array, initial: jax.Array, partition: Partition) -> jax.Array:
    """Reduces values [b, t, *d] over the tokens of c + 1 chunks; `initial` [b, *d] is the carried one's."""
    num_rows, num_places = values.shape[0], partition.num_slots + 1
    nothing = jnp.asarray(0 if how == "sum" else _NOTHING if values.dtype == jnp.float32 else -values.shape[1],
                          values.dtype)
    if partition.block is not None:  # no scatter
        values = jnp.where(_expand(partition.segment_ids != 0, values), values, nothing)
        padding = [(0, 0), (0, -values.shape[1] % partition.block)] + [(0, 0)] * (values.ndim - 2)
        values = jnp.pad(values, padding, constant_values=nothing)
        values = values.reshape(num_rows, -1, partition.block, *values.shape[2:])
        reduced = (jnp.sum if how == "sum" else jnp.max)(values, axis=2)
        return jnp.concatenate([initial[:, None], reduced], axis=1)
    row = jnp.arange(num_rows)[:, None]
    result = jnp.full((num_rows, num_places, *values.shape[2:]), nothing).at[:, 0].set(initial)
    at_chunk = result.at[row, partition.place]  # tokens in no chunk are past the end, and dropped
    return at_chunk.add(values, mode="drop") if how == "sum" else at_chunk.max(values, mode="drop")


def _expand(x: jax.Array, like: jax.Array) -> jax.Array:
    """Appends axes of 1 up to the rank of `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
