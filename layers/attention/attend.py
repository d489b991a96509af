"""Causal dot-product attention with a sliding window and segments."""
import importlib
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, Int, typed

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
