"""Rotary position embedding: half-split layout, optionally on part of each head."""
import dataclasses
from typing import Literal

import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """A stretch of the waves, for sequences longer than those of training.

    "linear" makes all of them `factor` times as long (arXiv 2306.15595). "llama3", that of Llama 3.1, spares the
    fast ones: waves that turn more than `high_frequency_factor` times within `original_length` stay as they are,
    those that turn less than `low_frequency_factor` times become `factor` times as long, others are blended.

    Attributes:
      kind: "llama3" or "linear".
      factor: of the wave lengths.
      original_length: tokens of the sequences that the model was first trained on.
    """

    kind: Literal["llama3", "linear"] = "llama3"
    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in ("llama3", "linear"):
            raise ValueError(f"kind {self.kind!r} is not one of llama3, linear")
        if self.factor < 1 or self.original_length < 1:
            raise ValueError(f"factor {self.factor} and original_length {self.original_length} must be at least 1")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(f"low_frequency_factor {self.low_frequency_factor} must be above 0 and below "
                             f"high_frequency_factor {self.high_frequency_factor}")


@typed
def rotary(
    x: Float[Array, "b t h k"], positions: Int[Array, "b t"], *, width: int, base: float = 10_000.0,
    scaling: RotaryScaling | None = None,
) -> Float[Array, "b t h k"]:
    """Rotates the first `width` features of each head by an angle that grows with position.

    RoFormer (arXiv 2104.09864) eq. 34, with feature j paired with j + width/2 instead of its neighbour.
    Angles and the rotation are float32; the result has the dtype of `x`. Features past `width` pass
    through; width 0 returns `x`.

    Args:
      base: wave length of the slowest pair, over 2 pi.
      scaling: stretches the slow waves; None = as they are.
    Raises:
      ValueError: `width` is odd, negative or wider than a head.
    """
    if width % 2 or not 0 <= width <= x.shape[-1]:
        raise ValueError(f"rotary width {width} must be even and within the head width {x.shape[-1]}")
    if width == 0:
        return x
    half = width // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequency = _stretch(frequency, scaling)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [b, t, 1, half]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:width].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., width:]], axis=-1)


def _stretch(frequency: Array, scaling: RotaryScaling) -> Array:
    """Divides frequencies by the factor of `scaling`, as far as each takes part."""
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = frequency * scaling.original_length / (2 * jnp.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share_kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequency * (share_kept + (1 - share_kept) / scaling.factor)
