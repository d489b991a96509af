"""Choosing the entries with the highest scores: a mask, and the same as lists of indices.

Rules are over the last axis: the `top_k` best, the fewest that hold `top_p` of all mass, those above `threshold`.
Of equal scores the lower index wins; -inf is never chosen. A choice has no gradient.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Int, Scalar, typed


class Choice(NamedTuple):
    """The chosen entries of an axis of n: a mask, and lists of l = min(top_k, n) indices; l = n without a `top_k`.

    Attributes:
      is_chosen: [..., n] bool.
      ids: [..., l] int32, the chosen indices, lowest first; n past the last, which a gather can drop.
      counts: [...] int32, how many are chosen.
    """

    is_chosen: jax.Array
    ids: jax.Array
    counts: jax.Array


@typed
def choose(
    scores: Float[Array, "*a n"],
    *,
    top_k: int | None = None,
    top_p: Scalar | None = None,
    threshold: Scalar | None = None,
    is_forced: Bool[Array, "*#a #n"] | None = None,
    is_forbidden: Bool[Array, "*#a #n"] | None = None,
) -> Choice:
    """Chooses the entries along the last axis that every rule given allows.

    Example: masses (.05, .4, .1, .3, .15) and top_p=0.8 choose 1, 3 and 4; with top_k=2 besides, 1 and 3.

    Args:
      top_k: the highest scores, this many at most; 0 chooses nothing.
      top_p: in [0, 1]: the smallest set whose scores sum to at least this fraction of all. Scores are then masses,
        not negative, such as probabilities; forced entries come first and count, forbidden ones do not.
      threshold: scores of at least this.
      is_forced: chosen whatever the score, and counted by `top_k`, which holds: past it the lower indices win.
      is_forbidden: never chosen, even if forced.
    Raises:
      ValueError: no rule was given, or top_k is negative.
    """
    if top_k is None and top_p is None and threshold is None:
        raise ValueError("choose needs a rule: top_k, top_p or threshold")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k {top_k} must be at least 0")
    scores = jax.lax.stop_gradient(scores)
    num_entries = scores.shape[-1]
    ranking = scores if is_forced is None else jnp.where(is_forced, jnp.inf, scores)
    if is_forbidden is not None:
        ranking = jnp.where(is_forbidden, -jnp.inf, ranking)

    may_choose = ranking > -jnp.inf
    if threshold is not None:
        may_choose &= ranking >= threshold
    if top_p is not None:
        may_choose &= _holds_mass(scores, ranking, top_p)
    num_listed = num_entries if top_k is None else min(top_k, num_entries)
    if num_listed == num_entries:
        is_chosen = may_choose
        ids = jnp.sort(jnp.where(is_chosen, jnp.arange(num_entries, dtype=jnp.int32), num_entries), axis=-1)
    else:
        ranking = jnp.where(may_choose, ranking, -jnp.inf)
        best, ids = jax.lax.top_k(ranking, num_listed)
        is_chosen = _among_best(ranking, best)
        ids = jnp.sort(jnp.where(best > -jnp.inf, ids, num_entries), axis=-1)  # k of them: far fewer than entries
    return Choice(is_chosen, ids, jnp.sum(ids < num_entries, axis=-1, dtype=jnp.int32))


@typed
def choose_in_groups(
    group_scores: Float[Array, "*a g"],
    scores: Float[Array, "*a n"],
    group_of: Int[Array, "*#a n"],
    *,
    num_groups: int,
    top_k: int,
    is_forced: Bool[Array, "*#a #n"] | None = None,
    is_forbidden: Bool[Array, "*#a #n"] | None = None,
) -> Choice:
    """Chooses groups first, then the best members of those: blocks of keys, then tokens in them.

    Args:
      group_of: the group of each member; one outside 0 .. g - 1 is in none, and is chosen only if forced.
      num_groups: groups to choose.
      top_k: members to choose from all of them together.
      is_forced, is_forbidden: members, as in `choose`; a forced one is chosen whatever its group.
    """
    is_open = choose(group_scores, top_k=num_groups).is_chosen
    group_of = jnp.broadcast_to(group_of, scores.shape)
    in_a_group = (group_of >= 0) & (group_of < group_scores.shape[-1])
    is_open = in_a_group & jnp.take_along_axis(is_open, jnp.where(in_a_group, group_of, 0), axis=-1)
    scores = jnp.where(is_open, scores, -jnp.inf)
    return choose(scores, top_k=top_k, is_forced=is_forced, is_forbidden=is_forbidden)


def _among_best(ranking: jax.Array, best: jax.Array) -> jax.Array:
    """Marks the entries that are not -inf among the k best; of those equal to the last one, the first few."""
    if best.shape[-1] == 0:
        return jnp.zeros(ranking.shape, bool)
    last = best[..., -1:]
    is_above, is_tied = ranking > last, (ranking == last) & (ranking > -jnp.inf)
    num_left = best.shape[-1] - jnp.sum(is_above, axis=-1, keepdims=True)
    return is_above | (is_tied & (jnp.cumsum(is_tied, axis=-1) <= num_left))


def _holds_mass(scores: jax.Array, ranking: jax.Array, top_p: Scalar) -> jax.Array:
    """Marks the entries that those ranked before them leave short of `top_p` of the mass."""
    mass = jnp.where(ranking > -jnp.inf, jnp.where(scores > -jnp.inf, scores, 0), 0).astype(jnp.float32)
    order = jnp.argsort(-ranking, axis=-1, stable=True)
    ordered = jnp.take_along_axis(mass, order, axis=-1)
    before = jnp.cumsum(ordered, axis=-1)[..., :-1]
    before = jnp.concatenate([jnp.zeros_like(ordered[..., :1]), before], axis=-1)
    is_short = before < top_p * jnp.sum(mass, axis=-1, keepdims=True)
    is_short |= jnp.asarray(top_p) >= 1  # rounding of the sums must not leave anything out
    is_short = jnp.take_along_axis(is_short, jnp.argsort(order, axis=-1), axis=-1)
    return (is_short & (mass > 0)) | (ranking == jnp.inf)
