"""The protocol of cache policies: which tokens of the past stay, in how many slots.

A policy is a frozen dataclass of sizes; its methods are pure functions of static shapes, so a budget may be an
array that differs between rows, key heads and, under `vmap`, layers.
"""
from typing import Literal, Protocol

import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.cache.kv_cache import FREE, KVCache, KVUpdate

Observation = Literal["received", "queries"]


class CachePolicy(Protocol):
    """Decides which tokens a cache keeps. Subclass it: `num_slots`, `append` and `keep_scores` are to be written.

    Attributes:
      observes: what `append` finds in an update besides the tokens: "received", the attention that each slot
        received from them, and "queries", theirs.
      per_head: every key head keeps tokens of its own; positions are then [b, n, s].
      is_weighted: slots have a `log_weight`, as where tokens are merged.
      keys: "rotated" by the position in the segment, once, when they are written. "unrotated" keys are rotated at
        each reading by the position that the cache holds for them at that time: only for policies that give
        tokens other positions later, since reading 2k slots then takes 12 times as long, and 8k slots 14 times.
    """

    observes: frozenset[Observation] = frozenset()
    per_head: bool = False
    is_weighted: bool = False
    keys: Literal["rotated", "unrotated"] = "rotated"

    def num_slots(self, max_length: int) -> int:
        """Returns the slots of a row that may grow to `max_length` tokens; never more than those are of use."""
        ...

    def append(self, cache: KVCache, new: KVUpdate) -> KVCache:
        """Adds new tokens, in as many calls as one likes; rows without any keep their cache as it is."""
        ...

    def keep_scores(self, cache: KVCache) -> Float[Array, "b p s"]:
        """Rates the token in each slot; those with the highest scores stay. Free slots may have any score."""
        ...

    def compress(self, cache: KVCache, budget: int | Int[Array, "..."]) -> KVCache:
        """Frees the slots past the `budget` best; see `keep_best`."""
        return keep_best(cache, self.keep_scores(cache), budget)

    def empty(
        self, batch: int, max_length: int, num_key_heads: int, key_width: int, dtype: jnp.dtype, *,
        value_width: int | None = None,
    ) -> KVCache:
        """Makes the cache before the first token, for rows that may grow to `max_length` tokens."""
        num_slots = self.num_slots(max_length)
        return KVCache.empty(
            batch, num_slots, num_key_heads, key_width, dtype, value_width=value_width, per_head=self.per_head,
            is_weighted=self.is_weighted,
            aux=self.empty_aux(batch, num_key_heads if self.per_head else 1, num_slots))

    def empty_aux(self, batch: int, num_position_heads: int, num_slots: int):
        """Makes the notes on each slot: a pytree of [batch, num_position_heads, num_slots, ...]."""
        return None


@typed
def keep_best(cache: KVCache, scores: Float[Array, "b p s"], budget: int | Int[Array, "..."]) -> KVCache:
    """Frees all occupied slots but those of the `budget` highest scores; of equal ones the lower slot stays.

    The arrays keep their sizes, so this saves reading only where a kernel skips free slots.

    Args:
      budget: slots, a number or an array that broadcasts to [b, p]; may be traced.
    """
    scores = jnp.where(cache.is_occupied, scores, -jnp.inf)
    order = jnp.argsort(-scores, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    stays = cache.is_occupied & (rank < jnp.asarray(budget)[..., None])
    return cache._replace(positions=jnp.where(stays, cache.positions, FREE))
