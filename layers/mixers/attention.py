"""Multi-head causal self-attention as a layer."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.arrays.segments import segment_positions
from layers.attention.attend import Implementation, attend
from layers.attention.mask import CAUSAL, SAME_SEGMENT, Mask, Window, token_info
from layers.cache.cached_attention import cached_attention
from layers.cache.kv_cache import KVCache, KVUpdate, place
from layers.cache.policies import KeepAll, KeepRecent
from layers.cache.policy import CachePolicy
from layers.mixers.cached_mixer import CachedMixer
from layers.nn.linear import Linear
from layers.nn.norms import rms_norm
from layers.nn.rotary import RotaryScaling, rotary


class Attention(CachedMixer):
    """Multi-head causal self-attention with rotary positions, which restart with every segment.

    Query head i reads key head i // (num_heads / num_key_heads). Its state is a cache of keys and values, which a
    policy keeps. It sows "queries", "keys" and "values" into "intermediates" where that collection is mutable.

    Attributes:
      num_heads: query heads.
      num_key_heads: heads of keys and values, which divide num_heads; 0 = num_heads.
      head_width: features of a head; 0 = width / num_heads.
      rotary_width: features of each head that are rotated; 0 = none.
      rotary_base, rotary_scaling: see `rotary`.
      window: earlier tokens that are seen; None = all.
      bias: projections of queries, keys and values have biases.
      qk_norm: queries and keys are normalised per head, before they are rotated.
      norm_epsilon: of that norm, added to the mean square.
      policy: tokens that the cache keeps; None = all that the window lets be seen.
      cache_dtype: of the keys and values that it keeps; None = dtype.
      init_std, out_init_std: standard deviations of the input and output projections at the start.
    """

    num_heads: int
    num_key_heads: int = 0
    head_width: int = 0
    rotary_width: int = 0
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling | None = None
    window: int | None = None
    bias: bool = False
    qk_norm: bool = False
    norm_epsilon: float = 1e-5
    policy: CachePolicy | None = None
    cache_dtype: jnp.dtype | None = None
    init_std: float = 0.02
    out_init_std: float = 0.02
    implementation: Implementation = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_ids: Int[Array, "b t"] | None = None,
        state: KVCache | None = None,
    ) -> tuple[Float[Array, "b t d"], KVUpdate | None]:
        """Returns the output, and the update of the cache (None if there was none).

        Raises:
          ValueError: the heads do not come out even.
        """
        width = x.shape[-1]
        if segment_ids is None:
            segment_ids = jnp.ones(x.shape[:2], jnp.int32)
        # Whatever stands at padding is hidden here, once, and not in each of q, k and v.
        q, k, v = self._project(jnp.where((segment_ids != 0)[..., None], x, 0))
        if state is None:
            positions = segment_positions(segment_ids)
            q, k = self._rotate(q, positions), self._rotate(k, positions)
            self._sow(q, k, v)
            y, update = self._attend(q, k, v, segment_ids), None
        else:
            y, update = self._attend_to_cache(q, k, v, segment_ids, state)
        y = Linear(
            (width,), ("heads", "head_width", "embed"),
            init_std=self.out_init_std, dtype=self.dtype, name="out")(y)
        return y, update

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Makes q [b, t, h, k], k and v [b, t, n, k], not rotated yet."""
        heads, key_heads, head_width = self._sizes(x.shape[-1])

        def project(features, name):
            axes = (*((None,) if len(features) == 3 else ()), "heads", "head_width")
            y = Linear(features, ("embed", *axes), init_std=self.init_std, dtype=self.dtype, name=name)(x)
            if self.bias:
                init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
                y = y + self.param(f"{name}_bias", init, features).astype(self.dtype)
            return y

        if key_heads == heads:
            qkv = project((3, heads, head_width), "qkv")
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        else:
            # Apart, so that both can be sharded over heads, whose numbers differ.
            q, kv = project((heads, head_width), "q"), project((2, key_heads, head_width), "kv")
            k, v = kv[:, :, 0], kv[:, :, 1]
        if self.qk_norm:
            init = nn.with_logical_partitioning(nn.initializers.ones, ("head_width",))
            q = rms_norm(q, self.param("q_norm_scale", init, (head_width,)), epsilon=self.norm_epsilon)
            k = rms_norm(k, self.param("k_norm_scale", init, (head_width,)), epsilon=self.norm_epsilon)
        return q, k, v

    def _sizes(self, width: int) -> tuple[int, int, int]:
        """Query heads, key heads and the width of each."""
        if not self.head_width and width % self.num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {self.num_heads}")
        key_heads = self.num_key_heads or self.num_heads
        if self.num_heads % key_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_key_heads {key_heads}")
        return self.num_heads, key_heads, self.head_width or width // self.num_heads

    def _rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return rotary(x, positions, width=self.rotary_width, base=self.rotary_base, scaling=self.rotary_scaling)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        tokens = token_info(q.shape[1], segment_ids=segment_ids)
        return attend(q, k, v, mask=self._mask, q_tokens=tokens, padding_is_finite=True,
                      implementation=self.implementation).o

    def _attend_to_cache(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVUpdate]:
        policy, placement = self.cache_policy, place(cache, segment_ids)
        q, rotated = self._rotate(q, placement.positions), self._rotate(k, placement.positions)
        self._sow(q, rotated, v)
        dtype = cache.k.dtype
        update = KVUpdate(rotated.astype(dtype), v.astype(dtype), placement.positions, segment_ids)
        slots, tokens = cache, update
        if policy.keys == "unrotated":
            update = update._replace(k=k.astype(dtype))
            slots = cache._replace(k=self._rotate_slots(cache))
            tokens = update._replace(k=self._rotate(update.k.astype(self.dtype), placement.positions))
        y, received = cached_attention(
            q, slots, tokens, placement, mask=self._mask, with_received="received" in policy.observes)
        return y, update._replace(received=received, queries=q if "queries" in policy.observes else None)

    def _rotate_slots(self, cache: KVCache) -> jax.Array:
        """Rotates cached keys [b, n, s, k] by the positions that the cache holds for them."""
        batch, num_key_heads, num_slots, _ = cache.k.shape
        positions = jnp.broadcast_to(cache.positions, (batch, num_key_heads, num_slots))
        rows = cache.k.astype(self.dtype).reshape(batch * num_key_heads, num_slots, 1, -1)
        return self._rotate(rows, positions.reshape(-1, num_slots)).reshape(cache.k.shape)

    def _sow(self, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
        for name, value in (("queries", q), ("keys", k), ("values", v)):  # "q" is a projection
            self.sow("intermediates", name, value)

    @property
    def _mask(self) -> Mask:
        mask = CAUSAL & SAME_SEGMENT
        return mask if self.window is None else mask & Window(self.window)

    @property
    def cache_policy(self) -> CachePolicy:
        if self.policy is not None:
            return self.policy
        return KeepAll() if self.window is None else KeepRecent(self.window + 1)

    def empty_state(self, batch: int, width: int, max_length: int) -> KVCache:
        """Makes an empty cache for segments of up to `max_length` tokens."""
        _, key_heads, head_width = self._sizes(width)
        return self.empty_cache(batch, max_length, key_heads, head_width)
