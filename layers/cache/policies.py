"""Cache policies by name. One of your own: a frozen dataclass that subclasses `CachePolicy`, and a line in
POLICIES.

The laws in tests/layers/cache/test_policies.py hold for all that are listed here.
"""
import dataclasses

import jax.numpy as jnp

from layers.array_types import Array, Float
from layers.cache.kv_cache import KVCache, KVUpdate, admit, write
from layers.cache.policy import CachePolicy


@dataclasses.dataclass(frozen=True)
class KeepAll(CachePolicy):
    """A slot for every token: attention to the cache is exact."""

    def num_slots(self, max_length: int) -> int:
        return max_length

    def append(self, cache: KVCache, new: KVUpdate) -> KVCache:
        return _append_in_rings(cache, new, num_sinks=0)

    def keep_scores(self, cache: KVCache) -> Float[Array, "b p s"]:
        return cache.positions.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class KeepRecent(CachePolicy):
    """The newest `budget` tokens. Exact where attention has a window of at most `budget` - 1 earlier tokens."""

    budget: int

    def __post_init__(self):
        _check_budget(self.budget, 1)

    def num_slots(self, max_length: int) -> int:
        return min(self.budget, max_length)

    def append(self, cache: KVCache, new: KVUpdate) -> KVCache:
        return _append_in_rings(cache, new, num_sinks=0)

    def keep_scores(self, cache: KVCache) -> Float[Array, "b p s"]:
        return cache.positions.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class KeepSinksAndRecent(CachePolicy):
    """The first `num_sinks` tokens and the newest others, `budget` in all (StreamingLLM, arXiv 2309.17453).

    Keys stay rotated by their position in the text, where the paper counts within the cache; the distance to the
    sinks then grows with the text.
    """

    budget: int
    num_sinks: int = 4

    def __post_init__(self):
        _check_budget(self.budget, self.num_sinks + 1)

    def num_slots(self, max_length: int) -> int:
        return min(self.budget, max_length)

    def append(self, cache: KVCache, new: KVUpdate) -> KVCache:
        return _append_in_rings(cache, new, num_sinks=self.num_sinks)

    def keep_scores(self, cache: KVCache) -> Float[Array, "b p s"]:
        is_sink = cache.positions < self.num_sinks
        return jnp.where(is_sink, jnp.inf, cache.positions.astype(jnp.float32))


POLICIES: dict[str, type[CachePolicy]] = {
    "full": KeepAll,
    "window": KeepRecent,
    "sink_recent": KeepSinksAndRecent,
}


def make_policy(name: str, **sizes: int) -> CachePolicy:
    """Makes the policy `name`, of those `sizes` that it has.

    Raises:
      ValueError: there is no such policy, or its sizes do not fit each other.
    """
    if name not in POLICIES:
        raise ValueError(f"cache policy {name!r} is not one of {', '.join(POLICIES)}")
    fields = {field.name for field in dataclasses.fields(POLICIES[name])}
    return POLICIES[name](**{size: value for size, value in sizes.items() if size in fields})


def _check_budget(budget: int, least: int) -> None:
    if budget < least:
        raise ValueError(f"cache budget {budget} must be at least {least} slots")


def _append_in_rings(cache: KVCache, new: KVUpdate, *, num_sinks: int) -> KVCache:
    """Keeps the first `num_sinks` tokens in slots of their own and the newest others in a ring of the rest."""
    cache, is_kept, num_read = admit(cache, new)
    ring = max(cache.num_slots - num_sinks, 1)  # with fewer slots than sinks no token gets past them
    is_sink = new.positions < num_sinks
    stays = is_kept & (is_sink | (new.positions >= num_read[:, None] - ring))
    slots = jnp.where(is_sink, new.positions, num_sinks + (new.positions - num_sinks) % ring)
    slots = jnp.where(stays, slots, -1)[:, None]
    return write(cache, new, jnp.broadcast_to(slots, (slots.shape[0], cache.positions.shape[1], slots.shape[2])),
                 num_read)
