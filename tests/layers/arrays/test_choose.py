import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import choose, choose_in_groups
from tests.support.inputs import Draw

INF = float("inf")


def _chosen(choice):
    """The indices chosen in a single row, checked to agree in all three forms."""
    ids = np.asarray(choice.ids)[: int(choice.counts)].tolist()
    assert np.flatnonzero(choice.is_chosen).tolist() == ids
    assert (np.asarray(choice.ids)[int(choice.counts):] == choice.is_chosen.shape[-1]).all()
    return ids


def test_top_k_of_equal_scores_takes_the_lower_indices():
    scores = jnp.array([1.0, 3, 2, 3, 2, 2])
    assert _chosen(choose(scores, top_k=4)) == [1, 2, 3, 4]
    assert _chosen(choose(scores, top_k=1)) == [1]
    assert _chosen(choose(scores, top_k=0)) == []
    assert _chosen(choose(scores, top_k=9)) == list(range(6))


def test_minus_infinity_is_never_chosen():
    scores = jnp.array([-INF, 1.0, -INF, 0.0])
    assert _chosen(choose(scores, top_k=3)) == [1, 3]
    assert _chosen(choose(jnp.full(4, -INF), top_k=2)) == []
    assert _chosen(choose(scores, threshold=-INF)) == [1, 3]


def test_top_p_takes_the_smallest_set_that_holds_the_mass():
    masses = jnp.array([0.05, 0.4, 0.1, 0.3, 0.15])
    assert _chosen(choose(masses, top_p=0.8)) == [1, 3, 4]
    assert _chosen(choose(masses, top_p=0.8, top_k=2)) == [1, 3]
    assert _chosen(choose(masses, top_p=0.0)) == []
    assert _chosen(choose(2 * masses, top_p=0.3)) == [1]  # a fraction of the sum, whatever that is
    tiny = jnp.array([1.0, 1e-12, 0.0, 1e-12])
    assert _chosen(choose(tiny, top_p=1.0)) == [0, 1, 3]


def test_threshold_takes_scores_of_at_least_that():
    assert _chosen(choose(jnp.array([0.5, 0.2, 0.7]), threshold=0.5)) == [0, 2]
    assert _chosen(choose(jnp.array([0.5, 0.2, 0.7]), threshold=0.5, top_k=1)) == [2]


def test_forced_entries_come_first_and_forbidden_ones_never():
    scores = jnp.array([-5.0, 4, 3, 2, -INF])
    is_forced = jnp.array([True, False, False, False, True])
    assert _chosen(choose(scores, top_k=3, is_forced=is_forced)) == [0, 1, 4]
    assert _chosen(choose(scores, top_k=1, is_forced=is_forced)) == [0]
    is_forbidden = jnp.array([False, True, False, False, True])
    assert _chosen(choose(scores, top_k=3, is_forced=is_forced, is_forbidden=is_forbidden)) == [0, 2, 3]
    masses = jnp.array([0.1, 0.5, 0.2, 0.2])
    is_forced = jnp.array([True, False, False, False])
    assert _chosen(choose(masses, top_p=0.6, is_forced=is_forced)) == [0, 1]
    assert _chosen(choose(masses, top_p=0.6, is_forbidden=jnp.array([False, True, False, False]))) == [2, 3]


def test_groups_are_chosen_before_their_members():
    group_scores, group_of = jnp.array([1.0, 3, 2]), jnp.array([0, 0, 1, 1, 2, 2, -1])
    scores = jnp.array([9.0, 8, 1, 5, 4, 6, 7])
    assert _chosen(choose_in_groups(group_scores, scores, group_of, num_groups=2, top_k=3)) == [3, 4, 5]
    is_forced = jnp.arange(7) == 0
    forced = choose_in_groups(group_scores, scores, group_of, num_groups=1, top_k=2, is_forced=is_forced)
    assert _chosen(forced) == [0, 3]
    everything = choose_in_groups(group_scores, scores[:6], group_of[:6], num_groups=3, top_k=4)
    assert _chosen(everything) == _chosen(choose(scores[:6], top_k=4))


@pytest.mark.parametrize("rule", [dict(top_k=5), dict(top_p=0.7), dict(threshold=0.6), dict(top_k=3, top_p=0.9)])
def test_rows_are_chosen_apart_as_numpy_would(rule):
    scores = jnp.round(Draw(0).uniform(2, 3, 17) * 8) / 8  # many equal ones
    choice = jax.jit(lambda scores: choose(scores, **rule))(scores)
    for row in np.ndindex(2, 3):
        values = np.asarray(scores[row])
        order = np.argsort(-values, kind="stable")
        before = np.concatenate([[0], np.cumsum(values[order])[:-1]])
        fits = (before < rule.get("top_p", INF) * values.sum()) & (values[order] >= rule.get("threshold", -INF))
        expected = np.sort(order[fits][: rule.get("top_k")])
        assert _chosen(jax.tree.map(lambda x: x[row], choice)) == expected.tolist()  # noqa: B023


def test_a_choice_has_no_gradient():
    weights = Draw(0)(7)
    through = jax.grad(lambda scores: jnp.sum(jnp.where(choose(scores, top_k=3).is_chosen, weights, 0)))
    assert (through(weights) == 0).all()


def test_a_choice_needs_a_rule():
    with pytest.raises(ValueError, match="needs a rule: top_k, top_p or threshold"):
        choose(jnp.ones(3))
    with pytest.raises(ValueError, match="top_k -1 must be at least 0"):
        choose(jnp.ones(3), top_k=-1)
