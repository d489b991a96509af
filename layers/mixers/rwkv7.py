"""The time mix of RWKV-7 (arXiv 2503.14456, section 4)."""
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.mixers.mixer import Mixer
from layers.mixers.parts import LowRank, l2_normalize, num_heads_for
from layers.nn.causal_conv import causal_depthwise_conv
from layers.nn.linear import Linear
from layers.recurrences.dplr_recurrence import dplr_recurrence
from layers.recurrences.matrix import MatrixImplementation

FASTEST_LOG_DECAY = -math.exp(-0.5)  # eq. 12: the lower bound of all log decays
NORM_EPSILON = 64e-5


class RWKV7State(NamedTuple):
    """State of a time mix between two tokens."""

    shift: jax.Array   # [b, 1, d]: the previous token
    memory: jax.Array  # [b, h, k, k] float32


class RWKV7TimeMix(Mixer):
    """`dplr_recurrence` over mixtures of each token with the previous one, then group norm, bonus and gate.

    The paper also mixes values with those of the first layer; that spans layers and is left out.

    Attributes:
      expand: inner width over model width.
      head_width: k and v; there are inner width / head_width heads.
      rank: features between the input and each of decay, rate and gate.
      init_std, out_init_std: initial standard deviations of the input and output projections.
    """

    expand: int = 1
    head_width: int = 64
    rank: int = 32
    init_std: float = 0.02
    out_init_std: float = 0.02
    implementation: MatrixImplementation = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_ids: Int[Array, "b t"] | None = None,
        state: RWKV7State | None = None,
    ) -> tuple[Float[Array, "b t d"], RWKV7State]:
        """Returns the layer's output, 0 at padding, and the state after the last real token of each row.

        Raises:
          ValueError: expand * d is not a multiple of head_width.
        """
        width = x.shape[-1]
        heads = num_heads_for(width, self.expand, self.head_width), self.head_width
        axes = ("heads", "head_width")
        shift, memory = state or (None, None)
        shift_taps = jnp.stack([jnp.ones(width), jnp.zeros(width)])  # a convolution that delays by one token
        before, shift = causal_depthwise_conv(
            x, shift_taps, jnp.zeros(width), initial_state=shift, segment_ids=segment_ids)

        def per_channel(name, value, shape=heads, axes=axes):
            init = nn.with_logical_partitioning(nn.initializers.constant(value), axes)
            return self.param(name, init, shape)

        def mixed(name):
            share = per_channel(f"{name}_shift", 0.5, (width,), ("embed",))
            return x + (before - x) * share.astype(x.dtype)

        def linear(name):
            project = Linear(heads, ("embed", *axes), init_std=self.init_std, dtype=self.dtype, name=name)
            return project(mixed(name))

        def low_rank(name, between=lambda z: z):
            return LowRank(heads, axes, self.rank, self.init_std, self.dtype, between, name=name)(mixed(name))

        r, k, v = (linear(name).astype(jnp.float32) for name in ("receptance", "key", "value"))
        decay_bias = self.param("decay_bias", nn.with_logical_partitioning(_decay_bias_init, axes), heads)
        decay = decay_bias + low_rank("decay", jnp.tanh).astype(jnp.float32)
        rate = jax.nn.sigmoid(per_channel("rate_bias", 0.0) + low_rank("rate").astype(jnp.float32))
        removed = l2_normalize(k * per_channel("removal_key", 0.85))
        k = k * (1 + (rate - 1) * per_channel("key_rate", 1.0))
        o, memory = dplr_recurrence(
            r, FASTEST_LOG_DECAY * jax.nn.sigmoid(decay), k, v, -removed, removed * rate, initial_state=memory,
            segment_ids=segment_ids, implementation=self.implementation)

        mean, variance = jnp.mean(o, axis=-1, keepdims=True), jnp.var(o, axis=-1, keepdims=True)
        o = (o - mean) * jax.lax.rsqrt(variance + NORM_EPSILON)
        o = o * per_channel("norm_scale", 1.0) + per_channel("norm_bias", 0.0)
        o = o + jnp.sum(r * k * per_channel("bonus", 0.0), axis=-1, keepdims=True) * v
        o = o.astype(self.dtype) * low_rank("gate", jax.nn.sigmoid)
        if segment_ids is not None:
            o = jnp.where((segment_ids != 0)[..., None, None], o, 0)
        y = Linear((width,), (*axes, "embed"), init_std=self.out_init_std, dtype=self.dtype, name="out")(o)
        return y, RWKV7State(shift, memory)

    def empty_state(self, batch: int, width: int, max_length: int = 0) -> RWKV7State:
        """The state before the first token, at this model width."""
        num_heads = num_heads_for(width, self.expand, self.head_width)
        return RWKV7State(
            jnp.zeros((batch, 1, width), self.dtype),
            jnp.zeros((batch, num_heads, self.head_width, self.head_width), jnp.float32))


def _decay_bias_init(key, shape, dtype=jnp.float32):
    """Spreads channels evenly, before the sigmoid, over initial memories of 9 to 1100 tokens."""
    return jnp.linspace(-6.5, -1.5, math.prod(shape), dtype=dtype).reshape(shape)
