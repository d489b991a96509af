"""Causal dot-product attention with a sliding window and segments; and its linen module."""
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Int, typed
from layers.linear import Linear
from layers.rotary import rotary
from layers.segments import segment_positions

AttentionImplementation = Literal["auto", "reference", "xla"]


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
    """Attends from every token to itself and to earlier tokens of its segment.

    softmax(q k^T / sqrt(k)) v ("Attention Is All You Need", eq. 1), softmax in float32. A token that sees
    nothing (padding) gets 0.

    Args:
      window: how many earlier tokens are seen; token i sees i - window .. i, so window + 1 of them. -1: all.
      segment_ids: 0 = padding; tokens see only their own segment. None: each row is one segment.
      implementation: "reference" is the float32 spec; "xla" is jax.nn.dot_product_attention, whose matmuls
        run in the input dtype; "auto" means "xla".
    Raises:
      ValueError: `window` is below -1.
    """
    if window < -1:
        raise ValueError(f"window {window} must be -1 (unlimited) or the number of earlier tokens to see")
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    may_attend = causal_mask(segment_ids, window)
    if implementation == "reference":
        return dot_product_attention_reference(q, k, v, may_attend)
    if q.shape[-1] != v.shape[-1]:
        raise NotImplementedError(
            f'implementation="xla" needs heads of one width; keys have {q.shape[-1]}, values {v.shape[-1]}')
    y = jax.nn.dot_product_attention(q, k, v, mask=may_attend[:, None], implementation="xla")
    return jnp.where((segment_ids != 0)[:, :, None, None], y, 0)


@typed
def causal_mask(segment_ids: Int[Array, "b t"], window: int = -1) -> Bool[Array, "b t t"]:
    """True where query i (axis 1) may see key j (axis 2)."""
    index = jnp.arange(segment_ids.shape[1])
    distance = index[:, None] - index[None, :]
    near = (distance >= 0) & (distance <= window) if window >= 0 else distance >= 0
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return near & same & (segment_ids != 0)[:, :, None]


@typed
def dot_product_attention_reference(
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


class Attention(nn.Module):
    """Multi-head causal self-attention with rotary positions, without biases.

    Positions restart with every segment.

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
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {self.num_heads}")
        if segment_ids is None:
            segment_ids = jnp.ones(x.shape[:2], jnp.int32)
        qkv = Linear(
            (3, self.num_heads, width // self.num_heads), ("embed", None, "heads", "head_width"),
            init_std=self.init_std, dtype=self.dtype, name="qkv")(x)
        positions = segment_positions(segment_ids)
        q = rotary(qkv[:, :, 0], positions, width=self.rotary_width)
        k = rotary(qkv[:, :, 1], positions, width=self.rotary_width)
        y = dot_product_attention(
            q, k, qkv[:, :, 2], window=self.window, segment_ids=segment_ids, implementation=self.implementation)
        return Linear(
            (width,), ("heads", "head_width", "embed"),
            init_std=self.out_init_std, dtype=self.dtype, name="out")(y)
