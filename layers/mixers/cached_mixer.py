"""Mixers whose state is a cache of keys and values."""
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Int
from layers.cache.kv_cache import KVCache, KVUpdate, empty_update
from layers.cache.policy import CachePolicy
from layers.mixers.mixer import Mixer


class CachedMixer(Mixer):
    """A mixer that keeps what its `cache_policy` keeps.

    It has `num_heads` query heads, a `dtype`, and a `cache_dtype`, which is None where the cache has the same.
    """

    @property
    def cache_policy(self) -> CachePolicy:
        raise NotImplementedError(f"{type(self).__name__} must define cache_policy")

    def empty_cache(self, batch: int, max_length: int, num_key_heads: int, key_width: int) -> KVCache:
        """Makes the cache before the first token, in the dtype of caches."""
        dtype = self.dtype if self.cache_dtype is None else self.cache_dtype
        return self.cache_policy.empty(batch, max_length, num_key_heads, key_width, dtype)

    def empty_update(self, state: KVCache) -> KVUpdate:
        update, observes = empty_update(state), self.cache_policy.observes
        received = queries = None
        if "received" in observes:
            received = jnp.zeros(state.k.shape[:3], jnp.float32)
        if "queries" in observes:
            queries = jnp.zeros((state.k.shape[0], 1, self.num_heads, state.k.shape[3]), self.dtype)
        return update._replace(received=received, queries=queries)

    def apply_update(self, state: KVCache, update: KVUpdate) -> KVCache:
        return self.cache_policy.append(state, update)

    def restart(self, state: KVCache, is_new: Bool[Array, "b"], width: int) -> KVCache:
        """Returns the state as it is: a cache finds by the segments of new tokens that another one begins."""
        return state

    def keep_scores(self, state: KVCache) -> Float[Array, "b p s"]:
        return self.cache_policy.keep_scores(state)

    def compress(self, state: KVCache, budget: int | Int[Array, "..."]) -> KVCache:
        return self.cache_policy.compress(state, budget)
