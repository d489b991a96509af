import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import Partition, PoolingScores, PoolState, chunk_lengths, chunk_pooled, summarize, summarize_next
from layers.chunking.summary import SummaryKind
from tests.support.inputs import Draw

KINDS = typing.get_args(SummaryKind)


def _mask(*rows):
    return jnp.array([[letter == "x" for letter in row] for row in rows])


def _expected(kind, x, scores):
    """The definition, for the tokens of one chunk."""
    x, scores = np.asarray(x, np.float64), np.asarray(scores, np.float64)
    if kind == "attention":
        weights = np.exp(scores - scores.max())
        return (weights[:, None] * x).sum(0) / weights.sum()
    return {"mean": lambda: x.mean(0), "mean_sqrt_length": lambda: x.mean(0) * np.sqrt(len(x)),
            "max": lambda: x.max(0), "first": lambda: x[0], "last": lambda: x[-1]}[kind]()


def _scores(kind, draw, *shape):
    return 30 * draw(*shape) if kind == "attention" else None  # far apart: sums must not overflow


@pytest.mark.parametrize("kind", KINDS)
def test_a_summary_is_that_of_the_tokens_of_its_chunk(kind):
    draw = Draw(0)
    ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    x, scores = draw(1, 8, 3) - 2, _scores(kind, draw, 1, 8)
    x = x.at[:, 7].set(jnp.nan)  # padding never matters
    scores = None if scores is None else scores.at[:, 7].set(jnp.nan)
    partition = Partition.from_boundaries(_mask("x.xxx.x."), ids, 6)
    found = summarize(x, partition, kind, scores=scores)
    for slot, tokens in enumerate([[0, 1], [2], [3], [4, 5], [6]]):
        own = np.zeros(len(tokens)) if scores is None else scores[0, jnp.array(tokens)]
        np.testing.assert_allclose(found[0, slot], _expected(kind, x[0, jnp.array(tokens)], own), rtol=1e-6)
    assert (found[0, 5] == 0).all() and found.dtype == jnp.float32


@pytest.mark.parametrize("kind", KINDS)
def test_summaries_of_blocks_equal_those_of_the_same_chunks_in_any_partition(kind):
    draw = Draw(1)
    x, scores = draw(2, 11, 3, 2), _scores(kind, draw, 2, 11, 3)
    ids = jnp.array([[1] * 11, [0, 0, 1, 1, 0, 0, 0, 0, 2, 2, 0]])
    blocks = Partition.blocks(ids, 4)
    same = Partition(**{**vars(blocks), "block": None})
    (value, pull), (expected, expected_pull) = (
        jax.vjp(lambda x: summarize(x, partition, kind, scores=scores), x)  # noqa: B023
        for partition in (blocks, same))
    np.testing.assert_allclose(value, expected, atol=1e-6)
    dy = draw(*value.shape)
    np.testing.assert_allclose(pull(dy)[0], expected_pull(dy)[0], atol=1e-6)
    assert (value[1, 1] == 0).all() and np.isfinite(pull(dy)[0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_summaries_token_by_token_equal_those_of_the_whole(kind):
    """Rows of two segments, of which the second begins amid a piece; a row that sits out keeps its sums."""
    draw = Draw(2)
    x, boundary = draw(2, 9, 3) - 2, _mask("x..x.xx..", "xx...x...")  # negative: 0 must not win as a maximum
    scores = _scores(kind, draw, 2, 9)
    ids = jnp.array([[4] * 5 + [5] * 4, [4] * 9])
    whole = Partition.from_boundaries(boundary, ids, 9)
    expected = summarize(x, whole, kind, scores=scores)
    step = jax.jit(summarize_next, static_argnums=2)
    for pieces in ([1] * 9, [4, 3, 2], [2, 7]):
        state, last_id, start = PoolState.empty(kind, (2, 3)), jnp.zeros(2, jnp.int32), 0
        ended = [[], []]
        for length in pieces:
            part = slice(start, start + length)
            own = None if scores is None else scores[:, part]
            partition = Partition.from_boundaries(boundary[:, part], ids[:, part], length, last_segment=last_id)
            found, state = step(x[:, part], partition, kind, state, scores=own)
            for row in range(2):
                num_begun = int(partition.starts_chunk[row].sum())
                ended[row] += [found[row, i] for i in range(num_begun) if (start, i) != (0, 0)]
            last_id, start = ids[:, part][:, -1], start + length
            idle = Partition.from_boundaries(boundary[:, :2], 0 * ids[:, :2], 2, last_segment=last_id)
            idle_scores = None if scores is None else scores[:, :2]
            _, state = step(x[:, :2], idle, kind, state, scores=idle_scores)
        last, _ = step(x[:, :2], idle, kind, state, scores=idle_scores)
        for row in range(2):
            np.testing.assert_allclose(
                jnp.stack([*ended[row], last[row, 0]]), expected[row, : len(ended[row]) + 1], rtol=1e-5, atol=1e-6)


def test_attention_with_equal_scores_is_the_mean_and_scores_may_be_per_head():
    x = Draw(0)(2, 8, 3, 4)
    partition = Partition.fixed(jnp.ones((2, 8), jnp.int32), 3)
    equal = summarize(x, partition, "attention", scores=jnp.full((2, 8), 5.0))
    np.testing.assert_allclose(equal, summarize(x, partition, "mean"), atol=1e-6)
    scores = Draw(1)(2, 8, 3)
    by_head = summarize(x, partition, "attention", scores=scores)
    for head in range(3):
        alone = summarize(x[:, :, head], partition, "attention", scores=scores[:, :, head])
        np.testing.assert_allclose(by_head[:, :, head], alone, atol=1e-6)


def test_scores_and_attention_come_together():
    x, partition = jnp.ones((1, 4, 2)), Partition.fixed(jnp.ones((1, 4), jnp.int32), 2)
    for kind, scores in (("attention", None), ("mean", jnp.ones((1, 4)))):
        with pytest.raises(ValueError, match="scores are for the kind 'attention'"):
            summarize(x, partition, kind, scores=scores)


def test_pooling_scores_begin_as_the_mean_and_have_a_gradient():
    x, partition = Draw(0)(1, 6, 4), Partition.fixed(jnp.ones((1, 6), jnp.int32), 3)
    module = PoolingScores()
    params = module.init(jax.random.key(0), x)

    def pooled(params):
        return summarize(x, partition, "attention", scores=module.apply(params, x))

    np.testing.assert_allclose(pooled(params), summarize(x, partition, "mean"), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(pooled(params) ** 2)))(params)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient))


def test_lengths_count_tokens_and_go_on():
    ids = jnp.array([[1, 1, 1, 1, 2, 0]])
    partition = Partition.from_boundaries(_mask("..x.x."), ids, 4, last_segment=jnp.array([1]))
    assert chunk_lengths(partition, jnp.array([3])).tolist() == [[5, 2, 1, 0, 0]]


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_slot_holds_the_chunk_before_it_in_its_own_segment(pooling):
    ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    partition = Partition.from_boundaries(_mask("x.xxx.x."), ids, 6)
    x = jnp.arange(1.0, 9)[None, :, None]
    slots, after = chunk_pooled(x, partition, pooling)
    of = {"mean": lambda *z: sum(z) / len(z), "max": max}[pooling]
    assert slots[0, :, 0].tolist() == [0, of(1, 2), 3, 0, of(5, 6), 0]
    assert after.count.tolist() == [1] and after.total.tolist() == [[7]]


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
def test_pooling_token_by_token_equals_pooling_at_once(pooling):
    x, boundary = Draw(0)(2, 9, 3) - 2, _mask("x..x.xx..", "xx.......")  # negative: 0 must not win as a maximum
    ones = jnp.ones((2, 9), jnp.int32)
    scores = _scores(pooling, Draw(1), 2, 9)
    whole, last = chunk_pooled(x, Partition.from_boundaries(boundary, ones, 9), pooling, scores=scores)
    state, found = PoolState.empty(pooling, (2, 3)), [[], []]
    for t in range(9):
        partition = Partition.from_boundaries(
            boundary[:, t : t + 1], ones[:, :1], 1, last_segment=jnp.full(2, min(t, 1), jnp.int32))
        own = None if scores is None else scores[:, t : t + 1]
        slot, state = chunk_pooled(x[:, t : t + 1], partition, pooling, scores=own, state=state)
        for row in np.flatnonzero(boundary[:, t]):
            found[row].append(slot[row, 0])
    for row in range(2):
        np.testing.assert_allclose(jnp.stack(found[row]), whole[row, : len(found[row])], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), state, last)


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
def test_pooled_gradients_are_finite_and_reach_each_token_of_a_chunk_that_ended(pooling):
    ids = jnp.array([[1, 1, 1, 1, 1, 0]])
    partition = Partition.from_boundaries(_mask("x..x.."), ids, 6)
    scores = jnp.zeros((1, 6)) if pooling == "attention" else None
    gradient = jax.grad(lambda x: chunk_pooled(x, partition, pooling, scores=scores)[0].sum())(Draw(0)(1, 6, 4))
    assert np.isfinite(gradient).all() and (gradient[0, 3:] == 0).all()
    np.testing.assert_allclose(gradient[0, :3].sum(0), 1, atol=1e-6)
