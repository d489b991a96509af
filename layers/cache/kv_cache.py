"""Keys and values of the tokens read so far, and attention to them."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, typed


class KVCache(NamedTuple):
    """Keys and values of the tokens read so far, rotated already; the newest ones, if there are more than slots.

    The token at position p of its row is in slot p mod s, so attention that sees `window` earlier tokens needs
    window + 1 slots, however long the row.
    """

    k: jax.Array          # [b, h, s, k]: as the matmuls read it, so that no step transposes it
    v: jax.Array          # [b, h, s, v]
    positions: jax.Array  # [b, s] int32: of the token in each slot; -1 = none yet
    length: jax.Array     # [b] int32: tokens read

    @classmethod
    def empty(cls, batch: int, capacity: int, num_heads: int, head_width: int, dtype: jnp.dtype) -> "KVCache":
        shape = (batch, num_heads, capacity, head_width)
        positions = jnp.full((batch, capacity), -1, jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, jnp.zeros(batch, jnp.int32))

    def positions_of(self, is_real: jax.Array) -> jax.Array:
        """[b, t] bool -> [b, t] int32: where in its row each new real token goes; -1 for the others."""
        return jnp.where(is_real, self.length[:, None] + jnp.cumsum(is_real, axis=1, dtype=jnp.int32) - 1, -1)

    def nothing_new(self) -> "KVUpdate":
        """The update of one padding token per row."""
        batch, num_heads, _, width = self.k.shape
        k = jnp.zeros((batch, 1, num_heads, width), self.k.dtype)
        v = jnp.zeros((batch, 1, num_heads, self.v.shape[-1]), self.v.dtype)
        return KVUpdate(k, v, jnp.full((batch, 1), -1, jnp.int32))

    def append(self, new: "KVUpdate") -> "KVCache":
        """Adds new tokens at their positions; rows without any keep their cache as it is."""
        num_slots = self.k.shape[2]
        length = jnp.maximum(self.length, jnp.max(new.positions, axis=1) + 1)
        stays = (new.positions >= 0) & (new.positions >= length[:, None] - num_slots)
        slot = jnp.where(stays, new.positions % num_slots, num_slots)  # one past the end is dropped
        row = jnp.arange(self.k.shape[0])[:, None]
        return KVCache(
            self.k.at[row, :, slot].set(new.k, mode="drop"),
            self.v.at[row, :, slot].set(new.v, mode="drop"),
            self.positions.at[row, slot].set(new.positions, mode="drop"),
            length,
        )


class KVUpdate(NamedTuple):
    """What new tokens add to a cache. Passed around in its place, it spares a copy of the cache at every turn."""

    k: jax.Array          # [b, t, h, k]
    v: jax.Array          # [b, t, h, v]
    positions: jax.Array  # [b, t] int32; -1 = nothing


@typed
def cached_attention(
    q: Float[Array, "b t h k"], cache: KVCache, new: KVUpdate, *, window: int = -1
) -> Float[Array, "b t h v"]:
    """Attends from new tokens to those in the cache and to each other, by their positions; see `masked_attention`.

    The cache is only read, where it is. Softmax is in float32.
    """
    def logits(k, positions):
        distance = new.positions[:, :, None] - positions[:, None, :]  # [b, t, s]
        may_attend = (distance >= 0) & (positions >= 0)[:, None, :]
        if window >= 0:
            may_attend &= distance <= window
        scores = jnp.einsum("bthk,bhsk->bhts", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
        return jnp.where(may_attend[:, None], scores, -jnp.inf)

    new_k, new_v = new.k.swapaxes(1, 2), new.v.swapaxes(1, 2)
    both = jnp.concatenate([logits(cache.k, cache.positions), logits(new_k, new.positions)], axis=-1)
    highest = jnp.max(both, axis=-1, keepdims=True)
    weights = jnp.exp(both - jnp.where(highest == -jnp.inf, 0, highest))  # a padding query sees nothing: all 0
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total == 0, 1, total)).astype(q.dtype)
    of_cache, of_new = jnp.split(weights, [cache.k.shape[2]], axis=-1)
    y = jnp.einsum("bhts,bhsv->bthv", of_cache, cache.v, preferred_element_type=jnp.float32)
    y = y + jnp.einsum("bhts,bhsv->bthv", of_new, new_v, preferred_element_type=jnp.float32)
    return y.astype(q.dtype)
