"""Strings follow their grammar step by step, and distractors break it."""
import functools

import jax
import numpy as np
import pytest

from experiments.tasks import selectivbench
from experiments.tasks.examples import count_right, sample_batch, split_key
from experiments.tasks.selectivbench import Grammar, SelectivBench, make_grammar

GRAMMAR = make_grammar(0, num_symbols=5, depth=3, density=0.4)
SOURCE = SelectivBench(
    GRAMMAR, num_shown=12, gaps=(0, 2), noise=0.2, distractor_probability=0.5, first_distractor=4)


@functools.cache
def _draw(source: SelectivBench, num_sequences: int):
    draw = jax.jit(functools.partial(sample_batch, (source,), 0, batch_size=num_sequences))
    return jax.tree.map(np.asarray, draw(split_key(0, "train"), 0))


@pytest.fixture(scope="module")
def batch():
    """Sequences, with the noise taken from their inputs."""
    noisy = _draw(SOURCE, 400)
    return noisy._replace(inputs=np.round(noisy.inputs))


def _allowed(grammar: Grammar, state: int) -> dict[int, int]:
    """{symbol: the state that it leads to}."""
    following = grammar.successors[state, : grammar.num_successors[state]]
    assert len(set(grammar.symbol[following])) == len(following), "a symbol leads to one state"
    return dict(zip(grammar.symbol[following].tolist(), following.tolist(), strict=True))


@pytest.mark.parametrize(("num_symbols", "depth", "density"), [(5, 3, 0.4), (12, 12, 0.4), (4, 1, 0.2)])
def test_a_grammar_has_the_states_of_its_family_and_forbids_what_it_does_not_allow(num_symbols, depth, density):
    grammar = make_grammar(1, num_symbols, depth, density)
    assert grammar.num_states == num_symbols * depth + 1 and grammar.num_symbols == num_symbols + 1
    assert np.bincount(grammar.symbol).tolist() == [1] + [depth] * num_symbols
    reaches, edges = {0}, {state: _allowed(grammar, state) for state in range(grammar.num_states)}
    for state, following in edges.items():
        forbidden = grammar.forbidden[state, : grammar.num_forbidden[state]].tolist()
        assert following and forbidden
        assert sorted([*following, *forbidden]) == list(range(num_symbols + 1))
    for _ in edges:
        reaches |= {state for state, following in edges.items() if reaches & set(following.values())}
    assert len(reaches) == grammar.num_states, "every state comes to the end of a string"
    assert len(edges[0]) == 4 and 0 not in edges[0]
    if grammar.num_states > 100:
        np.testing.assert_allclose(grammar.num_successors.mean() / grammar.num_symbols, density, rtol=0.05)
        copies = np.bincount(grammar.successors.ravel(), minlength=grammar.num_states)[1:].reshape(-1, depth)
        assert (copies > 0).mean() > 0.95, "few copies lead nowhere"
        np.testing.assert_allclose(grammar.entropy, np.log(grammar.num_successors.mean()), rtol=0.05)


def test_grammars_are_those_of_their_seed():
    same, other = make_grammar(0, 5, 3, 0.4), make_grammar(1, 5, 3, 0.4)
    assert (same.successors == GRAMMAR.successors).all()
    assert same.successors.shape != other.successors.shape or (same.successors != other.successors).any()


def test_every_step_is_what_the_grammar_says(batch):
    num_distractors, num_ends, gaps_seen = 0, 0, set()
    for inputs, labels, windows, segment_ids in zip(
            batch.inputs, batch.labels, batch.windows, batch.segment_ids, strict=True):
        state, shown, step = 0, 0, 0
        while shown < SOURCE.num_shown:
            symbol = int(inputs[step].argmax())
            assert inputs[step].sum() == 1
            state = _allowed(GRAMMAR, state)[symbol]
            num_ends += symbol == 0
            length = int((windows[segment_ids == 1] == shown).sum())
            gap = inputs[step + 1 : step + length]
            if length > 1 and gap[-1].any():
                assert shown >= SOURCE.first_distractor and gap[-1].sum() == 1
                assert int(gap[-1].argmax()) not in _allowed(GRAMMAR, state)
                num_distractors, gap = num_distractors + 1, gap[:-1]
            assert not gap.any()
            gaps_seen.add(len(gap))
            assert (windows[step : step + length] == shown).all() and (labels[step : step + length] == state).all()
            step, shown = step + length, shown + 1
        assert (segment_ids[:step] == 1).all() and not segment_ids[step:].any()
        assert (labels[step:] == -1).all() and not inputs[step:].any()
    assert gaps_seen == {0, 1, 2} and num_ends
    np.testing.assert_allclose(num_distractors / (400 * 8), 0.5, atol=0.05)


def test_successors_follow_with_equal_probability(batch):
    counts = np.zeros((GRAMMAR.num_states,) * 2)
    for labels, windows in zip(batch.labels, batch.windows, strict=True):
        states = labels[np.unique(windows, return_index=True)[1]]
        np.add.at(counts, ([0, *states[:-1]], states), 1)
    for state in np.flatnonzero(counts.any(axis=1)):
        following, num_followers = counts[state], GRAMMAR.num_successors[state]
        p = following[GRAMMAR.successors[state, :num_followers]] / following.sum()
        # Five standard deviations of a share that is measured so often.
        np.testing.assert_allclose(p, 1 / num_followers, atol=5 * (0.25 / following.sum()) ** 0.5)
    assert counts.sum(axis=1).max() > 300


def test_the_next_symbol_is_the_one_that_comes():
    source = SelectivBench(GRAMMAR, num_shown=6, gaps=(1, 1), target="next_symbol")
    for inputs, labels in zip(*_draw(source, 20)[:3:2], strict=True):
        shown = inputs[::2].argmax(axis=1)
        assert (labels[::2][:-1] == shown[1:]).all() and (labels[1::2] == labels[::2]).all()


def test_noise_is_uniform_around_the_input(batch):
    noise = _draw(SOURCE, 400).inputs - batch.inputs
    assert np.abs(noise).max() <= 0.2 and abs(noise.mean()) < 0.005
    np.testing.assert_allclose(noise.std(), 0.2 / 3**0.5, rtol=0.05)


def test_steps_of_a_window_are_answered_together(batch):
    """By the sum of their probabilities, and not by their majority."""
    batch = jax.tree.map(lambda leaf: leaf[:20], batch)
    logits = np.random.default_rng(0).standard_normal((*batch.labels.shape, GRAMMAR.num_states)).astype(np.float32)
    logits[:5] += 5 * np.eye(GRAMMAR.num_states)[batch.labels[:5]]
    right = 0
    for row in range(20):
        for shown in range(SOURCE.num_shown):
            steps = (batch.windows[row] == shown) & (batch.segment_ids[row] == 1)
            p = np.exp(logits[row, steps])
            right += (p / p.sum(axis=1, keepdims=True)).sum(axis=0).argmax() == batch.labels[row, steps][0]
    counted, asked = jax.jit(count_right)(logits, batch)
    assert (int(counted), int(asked)) == (right, 20 * SOURCE.num_shown) and right > 50


@pytest.mark.parametrize("arguments", [(3, 3, 0.4), (5, 0, 0.4), (5, 3, 0.0), (5, 3, 1.0)])
def test_impossible_grammars_are_refused(arguments):
    with pytest.raises(ValueError, match=r"must be at least 4, depth \d at least 1, and density"):
        make_grammar(0, *arguments)


def test_a_grammar_that_is_too_rare_is_refused(monkeypatch):
    monkeypatch.setattr(selectivbench, "_MOST_DRAWS", 1)
    with pytest.raises(ValueError, match="reaches '#' from every state; increase density"):
        make_grammar(0, 30, 1, 0.001)
