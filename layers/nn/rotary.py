"""Rotary position embedding: half-split layout, optionally on part of each head."""
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed


@typed
def rotary(
    x: Float[Array, "b t h k"], positions: Int[Array, "b t"], *, width: int, base: float = 10_000.0
) -> Float[Array, "b t h k"]:
    """Rotates the first `width` features of each head by an angle that grows with position.

    RoFormer (arXiv 2104.09864) eq. 34, with feature j paired with j + width/2 instead of its neighbour.
    Angles and the rotation are float32; the result has the dtype of `x`. Features past `width` pass
    through; width 0 returns `x`.

    Raises:
      ValueError: `width` is odd, negative or wider than a head.
    """
    if width % 2 or not 0 <= width <= x.shape[-1]:
        raise ValueError(f"rotary width {width} must be even and within the head width {x.shape[-1]}")
    if width == 0:
        return x
    half = width // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [b, t, 1, half]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:width].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., width:]], axis=-1)
