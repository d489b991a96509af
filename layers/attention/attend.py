"""Causal dot-product attention with a sliding window and segments; and its linen module."""
import importlib
from types import ModuleType
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Int, typed
from layers.arrays.segments import segment_positions
from layers.nn.linear import Linear
from layers.nn.rotary import rotary

AttentionImplementation = Literal["auto", "reference", "xla", "cudnn", "tokamax"]


@typed
def dot_product_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    *,
    window: int = -1,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: AttentionImplementation = "auto",
) -> Float[Array, "b t h v"]:
    """Attends from every token to itself and to earlier tokens of its segment; see `masked_attention`.

    Args:
      window: how many earlier tokens are seen; token i sees i - window .. i, so window + 1 of them. -1: all.
      segment_ids: 0 = padding; tokens see only their own segment. None: each row is one segment.
    Raises:
      ValueError: `window` is below -1.
    """
    if window < -1:
        raise ValueError(f"window {window} must be -1 (unlimited) or the number of earlier tokens to see")
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    return masked_attention(q, k, v, causal_mask(segment_ids, window), implementation=implementation)


@typed
def masked_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s h k"],
    v: Float[Array, "b s h v"],
    may_attend: Bool[Array, "b t s"],
    *,
    implementation: AttentionImplementation = "auto",
) -> Float[Array, "b t h v"]:
    """Returns softmax(q k^T / sqrt(k)) v over the keys that each query may see.

    "Attention Is All You Need" (arXiv 1706.03762), eq. 1; softmax in float32. A query that sees nothing gets 0.

    Args:
      implementation: "reference" is the float32 spec; "xla" and "cudnn" (NVIDIA GPUs, bfloat16) are those of
        jax.nn.dot_product_attention, whose matmuls run in the input dtype; "tokamax" is that package's choice
        for the device, where it is installed; "auto" means "xla".
    Raises:
      NotImplementedError: "xla" or "cudnn" was asked for heads whose keys and values differ in width, or "tokamax"
        is not installed.
    """
    if implementation == "reference":
        return masked_attention_reference(q, k, v, may_attend)
    if implementation == "tokamax":
        y = _tokamax().dot_product_attention(q, k, v, mask=may_attend[:, None])
    else:
        implementation = "xla" if implementation == "auto" else implementation
        if q.shape[-1] != v.shape[-1]:
            raise NotImplementedError(f'implementation="{implementation}" needs heads of one width; keys have '
                                      f"{q.shape[-1]}, values {v.shape[-1]}")
        y = jax.nn.dot_product_attention(q, k, v, mask=may_attend[:, None], implementation=implementation)
    return jnp.where(jnp.any(may_attend, axis=-1)[:, :, None, None], y, 0)


def _tokamax() -> ModuleType:
    try:
        flags = importlib.import_module("absl.flags").FLAGS
        if not flags.is_parsed():  # tokamax would read the command line for flags of its own, and refuse others
            flags.mark_as_parsed()
        return importlib.import_module("tokamax")
    except ImportError as error:
        raise NotImplementedError(
            f'implementation="tokamax" needs that package ({error}); pip install tokamax, or use "xla"') from error


@typed
def causal_mask(segment_ids: Int[Array, "b t"], window: int = -1) -> Bool[Array, "b t t"]:
    """True where query i (axis 1) may see key j (axis 2)."""
    index = jnp.arange(segment_ids.shape[1])
    distance = index[:, None] - index[None, :]
    near = (distance >= 0) & (distance <= window) if window >= 0 else distance >= 0
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return near & same & (segment_ids != 0)[:, :, None]


@typed
def masked_attention_reference(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s h k"],
    v: Float[Array, "b s h v"],
    may_attend: Bool[Array, "b t s"],
) -> Float[Array, "b t h v"]:
    mask = may_attend[:, None]  # [b, 1, t, s]
    exact = jax.lax.Precision.HIGHEST
    q, k, values = (z.astype(jnp.float32) for z in (q, k, v))
    logits = jnp.einsum("bthk,bshk->bhts", q, k, precision=exact) / q.shape[-1] ** 0.5
    # A row that sees nothing would be exp(-inf - -inf): give it finite logits, then no weight.
    weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)
    weights = jnp.where(mask, weights, 0)
    return jnp.einsum("bhts,bshv->bthv", weights, values, precision=exact).astype(v.dtype)


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


class Attention(nn.Module):
    """Multi-head causal self-attention with rotary positions, without biases.

    Positions restart with every segment; with a cache each row is one segment, which the cache began.

    Attributes:
      num_heads: heads; must divide the width of the input.
      rotary_width: features of each head that are rotated; 0 = none.
      window: earlier tokens that are seen; -1 = all.
      init_std, out_init_std: standard deviations of the input and output projections at the start.
    """

    num_heads: int
    rotary_width: int
    window: int = -1
    init_std: float = 0.02
    out_init_std: float = 0.02
    implementation: AttentionImplementation = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_ids: Int[Array, "b t"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "b t d"], KVUpdate | None]:
        """Returns the output, and what the real tokens are to add to the cache (None if there was none)."""
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {self.num_heads}")
        if segment_ids is None:
            segment_ids = jnp.ones(x.shape[:2], jnp.int32)
        is_real = segment_ids != 0
        qkv = Linear(
            (3, self.num_heads, width // self.num_heads), ("embed", None, "heads", "head_width"),
            init_std=self.init_std, dtype=self.dtype, name="qkv")(x)
        positions = segment_positions(segment_ids) if cache is None else cache.positions_of(is_real)
        q = rotary(qkv[:, :, 0], positions, width=self.rotary_width)
        k = rotary(qkv[:, :, 1], positions, width=self.rotary_width)
        v = qkv[:, :, 2]
        update = None
        if cache is None:
            y = dot_product_attention(
                q, k, v, window=self.window, segment_ids=segment_ids, implementation=self.implementation)
        else:
            update = KVUpdate(k.astype(cache.k.dtype), v.astype(cache.v.dtype), positions)
            y = cached_attention(q, cache, update, window=self.window)
        y = Linear(
            (width,), ("heads", "head_width", "embed"),
            init_std=self.out_init_std, dtype=self.dtype, name="out")(y)
        return y, update
