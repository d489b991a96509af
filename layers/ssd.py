"""State-space duality (SSD), the recurrence of Mamba-2: matrix states that one scalar per head lets fade.

  S_t = exp(log_decay_t) S_{t-1} + b_t x_t^T          S: [k, v], key dimension first
  y_t = S_t^T c_t

Transformers are SSMs (arXiv 2405.21060), eq. 16 and listing 1, with Mamba's dt already multiplied in: x is
dt * x and log_decay is dt * A. The chunkwise form computes a chunk's own part as masked
attention and carries the state between chunks. Two things keep it exact for hostile decays: decays inside a
chunk are sums over the tokens between (a segment sum), never differences of two large running sums;
and every exponent is <= 0, masked before it is taken, so neither values nor gradients overflow.
"""
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange

from layers.array_types import Array, Float, Int, typed
from layers.segments import segment_ordinals

SSDImplementation = Literal["auto", "reference", "chunkwise"]


@typed
def ssd_scan(
    x: Float[Array, "b t h v"],
    log_decay: Float[Array, "b t h"],
    b: Float[Array, "b t g k"],
    c: Float[Array, "b t g k"],
    *,
    initial_state: Float[Array, "b h k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: SSDImplementation = "auto",
    chunk_size: int = 64,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Returns every y_t, in the dtype of `x`, and the last state, in float32.

    Args:
      log_decay: natural log of the decay, <= 0.
      b, c: keys and queries; head i uses group i // (h / g).
      initial_state: enters the first token; None means zeros.
      segment_ids: 0 = padding, which leaves the state alone and has y = 0. The state is reset at each
        further segment; the last state is that of the last segment.
      implementation: "reference" steps token by token; "chunkwise" is for training, with the memory of one
        state per chunk; "auto" means "reference" for a single token, else "chunkwise".
      chunk_size: tokens per chunk; any length is padded with inert tokens.
    Raises:
      ValueError: the heads are not a multiple of the groups, or chunk_size < 1.
    """
    num_heads, num_groups = x.shape[2], b.shape[2]
    if num_heads % num_groups:
        raise ValueError(f"{num_heads} heads cannot share {num_groups} groups of keys evenly")
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1")
    if segment_ids is None:
        segment_ids = jnp.ones(x.shape[:2], jnp.int32)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], num_heads, b.shape[3], x.shape[3]), jnp.float32)
    if implementation == "auto":
        implementation = "reference" if x.shape[1] == 1 else "chunkwise"

    is_real = segment_ids != 0
    ordinal = segment_ordinals(segment_ids)
    inert_x = jnp.where(is_real[:, :, None, None], x, 0)
    inert_decay = jnp.where(is_real[:, :, None], log_decay, 0).astype(jnp.float32)
    run = {"reference": ssd_scan_reference, "chunkwise": partial(ssd_scan_chunkwise, chunk_size=chunk_size)}
    y, state = run[implementation](inert_x, inert_decay, b, c, initial_state.astype(jnp.float32), ordinal)
    return jnp.where(is_real[:, :, None, None], y, 0), state


@typed
def ssd_scan_reference(
    x: Float[Array, "b t h v"],
    log_decay: Float[Array, "b t h"],
    b: Float[Array, "b t g k"],
    c: Float[Array, "b t g k"],
    initial_state: Float[Array, "b h k v"],
    ordinal: Int[Array, "b t"],
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    heads_per_group = x.shape[2] // b.shape[2]
    b, c = (jnp.repeat(z, heads_per_group, axis=2) for z in (b, c))
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def step(carry, token):
        state, last_ordinal = carry
        x_t, log_decay_t, b_t, c_t, ordinal_t = token
        state = jnp.where((ordinal_t == last_ordinal)[:, None, None, None], state, 0)
        write = exact("bhk,bhv->bhkv", b_t.astype(jnp.float32), x_t.astype(jnp.float32))
        state = jnp.exp(log_decay_t)[:, :, None, None] * state + write
        y_t = exact("bhkv,bhk->bhv", state, c_t.astype(jnp.float32))
        return (state, ordinal_t), y_t.astype(x.dtype)

    tokens = jax.tree.map(lambda z: jnp.swapaxes(z, 0, 1), (x, log_decay, b, c, ordinal))  # [t, b, ...]
    (state, _), y = jax.lax.scan(step, (initial_state, jnp.ones_like(ordinal[:, 0])), tokens)
    return jnp.swapaxes(y, 0, 1), state


@typed
def ssd_scan_chunkwise(
    x: Float[Array, "b t h v"],
    log_decay: Float[Array, "b t h"],
    b: Float[Array, "b t g k"],
    c: Float[Array, "b t g k"],
    initial_state: Float[Array, "b h k v"],
    ordinal: Int[Array, "b t"],
    *,
    chunk_size: int,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    length, num_groups = x.shape[1], b.shape[2]
    size = min(chunk_size, length)
    pad = -length % size

    def split(z, mode="constant"):  # [b, t, ...] -> [chunks, b, size, ...]
        z = jnp.pad(z, ((0, 0), (0, pad)) + ((0, 0),) * (z.ndim - 2), mode=mode)
        return rearrange(z, "b (n l) ... -> n b l ...", l=size)

    grouped_x = rearrange(x, "b t (g r) v -> b t g r v", g=num_groups)
    grouped_decay = rearrange(log_decay, "b t (g r) -> b t g r", g=num_groups)
    state = rearrange(initial_state, "b (g r) k v -> b g r k v", g=num_groups)
    # Padding must not look like a new segment: it repeats the last ordinal, and zeros are inert.
    chunks = (split(grouped_x), split(grouped_decay), split(b), split(c), split(ordinal, mode="edge"))
    # Rematerialised, so that the backward pass keeps one state per chunk and no [size, size] matrix.
    body = jax.checkpoint(_one_chunk, prevent_cse=False)
    (state, _), y = jax.lax.scan(body, (state, jnp.ones_like(ordinal[:, 0])), chunks)
    y = rearrange(y, "n b l g r v -> b (n l) (g r) v")[:, :length]
    return y, rearrange(state, "b g r k v -> b (g r) k v")


def _one_chunk(carry, chunk):
    """Advances the state over one chunk. i reads, j writes; both count tokens of the chunk."""
    state, state_ordinal = carry  # [b, g, r, k, v], [b]
    x, log_decay, b, c, ordinal = chunk  # [b, l, g, r, v], [b, l, g, r], [b, l, g, k] twice, [b, l]
    # Default precision would round float32 inputs to TF32 or bfloat16 on accelerators.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    einsum = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    out_dtype = x.dtype
    x, b, c = (z.astype(jnp.float32) for z in (x, b, c))
    log_decay = jnp.moveaxis(log_decay, 1, -1)  # [b, g, r, l]

    same_segment = ordinal[:, :, None] == ordinal[:, None, :]
    earlier = jnp.tril(jnp.ones((x.shape[1],) * 2, bool)) & same_segment  # [b, i, j]
    mixing = jnp.exp(jnp.where(earlier[:, None, None], _segment_sum(log_decay), -jnp.inf))  # [b, g, r, i, j]
    scores = einsum("bigk,bjgk->bgij", c, b)
    y = einsum("bgrij,bjgrv->bigrv", scores[:, :, None] * mixing, x)

    sees_state = (ordinal == state_ordinal[:, None])[:, None, None]
    fade_in = jnp.exp(jnp.where(sees_state, _running_sum(log_decay), -jnp.inf))  # [b, g, r, i]
    y = y + einsum("bigk,bgrkv,bgri->bigrv", c, state, fade_in)

    last = ordinal[:, -1]
    lasts = (ordinal == last[:, None])[:, None, None]
    rest = jnp.flip(_running_sum(jnp.flip(log_decay, -1)), -1)  # sums from a token to the end
    after = jnp.concatenate([rest[..., 1:], jnp.zeros_like(rest[..., :1])], axis=-1)
    fade_out = jnp.exp(jnp.where(lasts, after, -jnp.inf))  # [b, g, r, j]
    kept = jnp.where(last == state_ordinal, 0.0, -jnp.inf)[:, None, None] + rest[..., 0]
    state = jnp.exp(kept)[..., None, None] * state + einsum("bjgk,bgrj,bjgrv->bgrkv", b, fade_out, x)
    return (state, last), y.astype(out_dtype)


def _segment_sum(log_decay: jax.Array) -> jax.Array:
    """[..., l] -> [..., i, j], the sum over j < l <= i; 0 where that is empty (i <= j)."""
    after_j = jnp.tril(jnp.ones((log_decay.shape[-1],) * 2, bool), -1)  # [l, j]
    summed = _running_sum(jnp.swapaxes(jnp.where(after_j, log_decay[..., :, None], 0), -1, -2))  # [..., j, i]
    return jnp.swapaxes(summed, -1, -2)


def _running_sum(x: jax.Array) -> jax.Array:
    """Cumulative sum over the last axis as a matmul, which beats a windowed reduction at these lengths."""
    ones = jnp.triu(jnp.ones((x.shape[-1],) * 2, x.dtype))
    return jnp.matmul(x, ones, precision=jax.lax.Precision.HIGHEST)
