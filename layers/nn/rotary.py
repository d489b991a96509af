"""Rotary position embedding: half-split layout, optionally on part of each head."""
import dataclasses
import math
from typing import Literal, get_args

import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed

ScalingKind = Literal["llama3", "linear", "ntk", "yarn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """A stretch of the waves, for sequences longer than those of training.

    "linear" makes all of them `factor` times as long (arXiv 2306.15595). "ntk" raises the base, so that only the
    slowest becomes `factor` times as long. "llama3", that of Llama 3.1, spares the fast ones: waves that turn more
    than `high_frequency_factor` times within `original_length` stay as they are, those that turn less than
    `low_frequency_factor` times become `factor` times as long, others are blended. "yarn" (arXiv 2309.00071) does
    the same between `fast_turns` and `slow_turns`, in its released form: blended linearly in the index of a wave
    between the two waves that turn this often, where the paper's text blends linearly in turns. It scales cosines
    and sines besides, which sharpens the attention.

    Attributes:
      kind: "llama3", "linear", "ntk" or "yarn".
      factor: of the wave lengths.
      low_frequency_factor, high_frequency_factor: of "llama3".
      fast_turns, slow_turns: of "yarn".
      attention_factor: of "yarn", on cosines and sines; None = 0.1 ln(factor) + 1.
      original_length: tokens of the sequences that the model was first trained on.
    """

    kind: ScalingKind = "llama3"
    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    attention_factor: float | None = None
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in get_args(ScalingKind):
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(get_args(ScalingKind))}")
        if self.factor < 1 or self.original_length < 1:
            raise ValueError(f"factor {self.factor} and original_length {self.original_length} must be at least 1")
        for low, high in (("low_frequency_factor", "high_frequency_factor"), ("slow_turns", "fast_turns")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"{low} {getattr(self, low)} must be above 0 and below {high} {getattr(self, high)}")
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise ValueError(f"attention_factor {self.attention_factor} must be above 0, or None for that of YaRN")

    @property
    def amplitude(self) -> float:
        """The factor on cosines and sines."""
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor


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
        frequency = stretch(frequency, base, scaling)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [b, t, 1, half]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scaling is not None and scaling.amplitude != 1:
        cos, sin = scaling.amplitude * cos, scaling.amplitude * sin
    first, second = x[..., :half].astype(jnp.float32), x[..., half:width].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., width:]], axis=-1)


def stretch(frequency: Array, base: float, scaling: RotaryScaling) -> Array:
    """Lowers the frequencies base^(-j / half) for j = 0 .. half - 1, as far as each takes part in `scaling`."""
    half = frequency.shape[0]
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "ntk":  # base * factor^(half / (half - 1)): j = half - 1 is divided by the whole factor
        return frequency * scaling.factor ** (-jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1))
    if scaling.kind == "yarn":
        share_kept = _yarn_share_kept(half, base, scaling)
    else:
        turns = frequency * scaling.original_length / (2 * jnp.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        share_kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequency * (share_kept + (1 - share_kept) / scaling.factor)


def _yarn_share_kept(half: int, base: float, scaling: RotaryScaling) -> Array:
    def index_of(turns: float) -> float:  # of the wave that turns this often within original_length
        return half * math.log(scaling.original_length / (2 * math.pi * turns)) / math.log(base)

    low = max(math.floor(index_of(scaling.fast_turns)), 0)
    high = min(math.ceil(index_of(scaling.slow_turns)), 2 * half - 1)
    return 1 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / max(high - low, 1e-3), 0, 1)
