"""Laws of cache policies: those in the registry, one that watches what slots receive, one that rotates late."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import POLICIES, Attention, CachePolicy, KeepRecent, KVUpdate, keep_best, make_policy, place
from layers.cache.kv_cache import admit, empty_update, write
from tests.support.inputs import Draw

B, N, H, K, D, LENGTH, BUDGET = 2, 2, 4, 4, 12, 14, 6


@dataclasses.dataclass(frozen=True)
class HeavyHitters(CachePolicy):
    """Every key head keeps the tokens that received most attention (H2O, arXiv 2306.14048), and the newest one."""

    budget: int
    observes = frozenset({"received"})
    per_head = True

    def num_slots(self, max_length):
        return min(self.budget, max_length)

    def empty_aux(self, batch, num_position_heads, num_slots):
        return jnp.zeros((batch, num_position_heads, num_slots), jnp.float32)

    def append(self, cache, new):
        if new.received is not None:
            cache = cache._replace(aux=jnp.where(cache.is_occupied, cache.aux + new.received, 0))
        for token in range(new.k.shape[1]):  # one by one: which makes room for the next depends on those before
            one = jax.tree.map(lambda z, token=token: z[:, token : token + 1], new._replace(received=None))
            admitted = admit(cache, one)
            cache = admitted.cache
            slot = jnp.argmin(jnp.where(cache.is_occupied, self.keep_scores(cache), -jnp.inf), axis=-1)
            slot = jnp.where(admitted.is_kept, slot, -1)[..., None]
            cache = write(cache, one, slot, admitted.num_read)
        return cache

    def keep_scores(self, cache):
        return cache.aux


class KeepRecentUnrotated(KeepRecent):
    """The newest tokens, whose keys are rotated at each reading."""

    keys = "unrotated"


MAKE = {name: lambda budget, name=name: make_policy(name, budget=budget, num_sinks=2) for name in POLICIES}
MAKE["heavy hitters"] = HeavyHitters
MAKE["unrotated keys"] = KeepRecentUnrotated
every_policy = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


def _update(start, stop, *, segment=1, ids=None):
    """Tokens start .. stop of a text, as they come after the cache of the earlier ones."""
    draw, text = Draw(0), {}
    for name in "kv":
        text[name] = draw(B, LENGTH, N, K)[:, start:stop]
    ids = jnp.full((B, stop - start), segment, jnp.int32) if ids is None else ids
    positions = jnp.where(ids != 0, jnp.arange(start, stop), -1)
    return KVUpdate(text["k"], text["v"], positions, ids, received=jnp.zeros((B, N, 1)))


def _kept(cache):
    """For every row and position head, the kept positions and their keys, in order."""
    positions = np.asarray(cache.positions)
    kept = []
    for row, head in np.ndindex(*positions.shape[:2]):
        slots = np.flatnonzero(positions[row, head] >= 0)
        slots = slots[np.argsort(positions[row, head, slots])]
        heads = [head] if positions.shape[1] > 1 else range(N)
        keys = [np.asarray(cache.k)[row, n, slots].tolist() for n in heads]
        kept.append((positions[row, head, slots].tolist(), keys))
    return kept


def _read(policy, pieces):
    cache = policy.empty(B, LENGTH, N, K, jnp.float32)
    append = jax.jit(policy.append)
    for start, stop in pieces:
        cache = append(cache, _update(start, stop))
    return cache


@every_policy
def test_a_cache_never_holds_more_than_its_budget(make):
    policy = make(BUDGET)
    cache = _read(policy, [(0, 5), (5, 6), (6, LENGTH)])
    num_kept = jnp.sum(cache.positions >= 0, axis=-1)
    assert cache.k.shape[2] == policy.num_slots(LENGTH) <= LENGTH
    np.testing.assert_array_equal(num_kept, policy.num_slots(LENGTH))  # and no slot is left empty
    np.testing.assert_array_equal(cache.num_read, LENGTH)


@every_policy
def test_appending_in_pieces_equals_appending_at_once(make):
    policy = make(BUDGET)
    whole = _read(policy, [(0, LENGTH)])
    for pieces in ([(0, 1), (1, 9), (9, LENGTH)], [(t, t + 1) for t in range(LENGTH)]):
        assert _kept(_read(policy, pieces)) == _kept(whole)


@every_policy
def test_compression_keeps_the_best_within_a_budget_that_differs_by_row_and_head(make):
    policy = make(BUDGET)
    cache = _read(policy, [(0, LENGTH)])
    budget = jnp.arange(cache.positions[..., 0].size).reshape(cache.positions.shape[:2]) + 1
    compress = jax.jit(policy.compress)
    for budgets in (budget, budget + 2, jnp.int32(2), jnp.int32(0), jnp.int32(LENGTH)):
        small = compress(cache, budgets)
        held = np.asarray(small.positions >= 0)
        expected = np.minimum(np.broadcast_to(budgets, held.shape[:2]), policy.num_slots(LENGTH))
        np.testing.assert_array_equal(held.sum(-1), expected)
        scores = np.asarray(policy.keep_scores(cache))
        for row, head in np.ndindex(*held.shape[:2]):
            dropped = ~held[row, head]
            if dropped.any() and not dropped.all():
                assert scores[row, head][held[row, head]].min() >= scores[row, head][dropped].max()
    assert compress._cache_size() <= 2, "budgets are traced"
    np.testing.assert_array_equal(small.positions, cache.positions)


@every_policy
def test_an_empty_update_changes_nothing(make):
    policy = make(BUDGET)
    cache = _read(policy, [(0, 5)])
    jax.tree.map(np.testing.assert_array_equal, policy.append(cache, empty_update(cache)), cache)


@every_policy
def test_another_segment_frees_the_slots_of_the_one_before(make):
    policy = make(BUDGET)
    cache = _read(policy, [(0, 5)])
    ids = jnp.array([[1, 1, 2, 2], [1, 0, 0, 0]])
    new = _update(5, 9, ids=ids)
    new = new._replace(positions=place(cache, ids).positions)
    after = policy.append(cache, new)
    np.testing.assert_array_equal(after.num_read, [2, 6])
    kept = [sorted(positions[positions >= 0].tolist()) for positions in np.asarray(after.positions[:, 0])]
    assert kept[0] == [0, 1] and len(kept[1]) == min(6, policy.num_slots(LENGTH)) and 5 in kept[1]
    occupied = np.asarray(after.positions >= 0)
    assert (np.asarray(after.segments)[occupied] == np.repeat([2, 1], occupied.sum((1, 2)))).all()


def _attention(policy):
    module = Attention(num_heads=H, num_key_heads=N, head_width=K, rotary_width=K, policy=policy)
    x = Draw(1)(B, LENGTH, D)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: Draw(2)(*leaf.shape) * 0.5, shapes)
    return module, params, x


def _decode(module, params, x, ids, pieces):
    """Reads `x` in pieces, and returns the outputs and the last cache."""
    run = jax.jit(lambda x, ids, state: module.apply(params, x, ids, state))
    apply_update = jax.jit(module.apply_update)
    state, outputs = module.empty_state(B, D, LENGTH), []
    for start, stop in pieces:
        y, update = run(x[:, start:stop], ids[:, start:stop], state)
        state = apply_update(state, update)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


@every_policy
def test_a_budget_of_the_whole_length_is_full_attention(make):
    module, params, x = _attention(make(LENGTH))
    ids = jnp.ones((B, LENGTH), jnp.int32).at[1, 6:].set(2)
    whole, _ = module.apply(params, x, ids)
    pieces = [(0, 3), (3, 4), (4, 9), *((t, t + 1) for t in range(9, LENGTH))]
    y, _ = _decode(module, params, x, ids, pieces)
    np.testing.assert_allclose(y, whole, atol=1e-5)


@every_policy
def test_padding_and_other_segments_are_never_read(make):
    """Whatever stands at padding, in free slots or in a segment before, the outputs are the same to the bit."""
    module, params, x = _attention(make(BUDGET))
    ids = jnp.array([[1] * 4 + [0, 0] + [3] * 5 + [0] + [3] * 2, [0, 0] + [7] * 12])
    pieces = [(0, 6), (6, 12), (12, 13), (13, LENGTH)]
    y, _ = _decode(module, params, x, ids, pieces)
    foreign = (ids == 0) | (ids == 1)
    z, _ = _decode(module, params, jnp.where(foreign[..., None], 1e6, x), ids, pieces)
    own = np.asarray(~foreign)
    np.testing.assert_array_equal(np.asarray(y)[own], np.asarray(z)[own])


@every_policy
def test_a_segment_id_may_come_again(make):
    """Episodes that are numbered 1, 2, 1: the third knows nothing of the first."""
    module, params, x = _attention(make(BUDGET))
    ids = jnp.array([[1] * 5 + [2] * 4 + [1] * 5] * B)
    y, _ = _decode(module, params, x, ids, [(0, 5), (5, 9), (9, LENGTH)])
    alone, _ = _decode(module, params, x[:, 9:], jnp.ones((B, 5), jnp.int32), [(0, 5)])
    np.testing.assert_allclose(y[:, 9:], alone, atol=1e-5)


def test_sinks_stay_and_the_others_are_the_newest():
    cache = _read(make_policy("sink_recent", budget=BUDGET, num_sinks=2), [(0, 3), (3, 9)])
    assert sorted(np.asarray(cache.positions)[0, 0].tolist()) == [0, 1, 5, 6, 7, 8]
    cache = _read(make_policy("window", budget=BUDGET), [(0, 3), (3, 9)])
    assert sorted(np.asarray(cache.positions)[0, 0].tolist()) == [3, 4, 5, 6, 7, 8]


def test_of_equal_scores_the_lower_slot_stays():
    cache = _read(make_policy("full"), [(0, 4)])
    kept = keep_best(cache, jnp.zeros(cache.positions.shape), 2).positions
    assert np.flatnonzero(np.asarray(kept)[0, 0] >= 0).tolist() == [0, 1]


def test_a_policy_that_does_not_exist_or_fit_is_refused():
    with pytest.raises(ValueError, match="cache policy 'lru' is not one of full, window, sink_recent"):
        make_policy("lru")
    with pytest.raises(ValueError, match="cache budget 4 must be at least 5 slots"):
        make_policy("sink_recent", budget=4)
