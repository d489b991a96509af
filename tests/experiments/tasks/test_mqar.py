"""Sequences of MQAR follow its definition, and the gaps its power law."""
import functools

import jax
import numpy as np
import pytest

from experiments.tasks.examples import sample_batch, split_key
from experiments.tasks.mqar import MQAR


@functools.cache
def _draw(source: MQAR, num_sequences: int):
    draw = jax.jit(functools.partial(sample_batch, (source,), 0, batch_size=num_sequences))
    return jax.tree.map(np.asarray, draw(split_key(0, "train"), 0))


FULL = MQAR(vocab_size=64, length=37, num_pairs=9)  # the queries of 9 pairs leave one token
SPARSE = MQAR(vocab_size=20, length=80, num_pairs=9, random_non_queries=False)  # with all keys that there are


@pytest.mark.parametrize(("source", "fills"), [(FULL, True), (SPARSE, False)])
def test_a_sequence_is_pairs_and_then_each_key_once_where_its_value_is_asked(source, fills):
    batch, half, num_pairs = _draw(source, 500), source.vocab_size // 2, source.num_pairs
    for tokens, positions, labels in zip(batch.inputs, batch.positions, batch.labels, strict=True):
        value_of = {}
        for index in range(num_pairs):
            key, value = tokens[2 * index], tokens[2 * index + 1]
            assert 1 <= key < half <= value < source.vocab_size
            value_of[key] = value
        assert len(value_of) == len(set(value_of.values())) == num_pairs
        assert len(set(positions)) == num_pairs and all(positions % 2 == 0)
        assert all((2 * num_pairs <= positions) & (positions < source.length))
        asked = {tokens[position]: label for position, label in zip(positions, labels, strict=True)}
        assert asked == value_of
        others = np.delete(tokens[2 * num_pairs:], positions - 2 * num_pairs)
        assert others.any() == fills
    assert (batch.segment_ids == 1).all()


def test_random_slots_hold_any_token_with_equal_probability():
    batch = _draw(FULL, 500)
    is_other = np.ones(batch.inputs.shape, bool)
    is_other[:, : 2 * FULL.num_pairs] = is_other[np.arange(500)[:, None], batch.positions] = False
    counts = np.bincount(batch.inputs[is_other], minlength=FULL.vocab_size)
    mean = is_other.sum() / FULL.vocab_size
    np.testing.assert_allclose(counts, mean, atol=5 * mean**0.5)


def test_gaps_are_drawn_one_after_the_other_with_the_weights_of_those_left():
    source = MQAR(vocab_size=64, length=12, num_pairs=2, power=0.3)
    gaps = _draw(source, 20_000).positions // 2 - 2  # [sequences, pairs], from 0
    weights = np.arange(1, 5) ** (0.3 - 1)
    p = weights / weights.sum()
    for first in range(4):
        second = gaps[gaps[:, 0] == first, 1]
        np.testing.assert_allclose(len(second) / len(gaps), p[first], atol=0.015)
        rest = np.where(np.arange(4) == first, 0, p) / (1 - p[first])
        np.testing.assert_allclose(np.bincount(second, minlength=4) / len(second), rest, atol=0.03)


@pytest.mark.parametrize(("fields", "message"), [
    (dict(length=15, num_pairs=4), "4 pairs do not fit into 15 tokens: pairs and queries take 16; ask for 1 to 3"),
    (dict(num_pairs=0), "0 pairs do not fit"),
    (dict(vocab_size=63), "vocab_size 63 must be even"),
    (dict(vocab_size=8), "vocab_size 8 must be even and at least 10"),
    (dict(power=0.0), "power 0.0 must be above 0"),
])
def test_impossible_sequences_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MQAR(**dict(vocab_size=64, length=64, num_pairs=4) | fields)
