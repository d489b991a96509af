"""Sizes of a stack of residual blocks, which encoders, main networks and models without chunks are made of."""
import dataclasses
from typing import Any, Literal, TypeVar, get_args

import jax.numpy as jnp

from hnet.layout import MIXER_CONFIGS, MIXERS, has_feed_forward, mixer_of, parse_layout
from layers import CachePolicy, RotaryScaling, make_policy

RematPolicy = Literal["none", "dots", "block"]  # nothing; all but matmuls with weights; the whole block
CacheDtype = Literal["", "float32", "bfloat16", "float16"]
Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The tokens whose keys and values attention keeps while it decodes.

    Attributes:
      policy: a name in `layers.POLICIES`; "full" keeps all that attention may still see.
      budget: slots of a policy that has a bound.
      num_sinks: first tokens that "sink_recent" keeps, of its budget.
      dtype: of cached keys and values; "" = that of the model. Matmuls run in the model's all the same: a narrower
        dtype saves memory and rounds each key and value once. float16 ends at 65504.
    """

    policy: str = "full"
    budget: int = 0
    num_sinks: int = 4
    dtype: CacheDtype = ""

    def __post_init__(self):
        self.make_policy()
        if self.dtype not in get_args(CacheDtype):
            known = ", ".join(name for name in get_args(CacheDtype) if name)
            raise ValueError(f"attention.cache.dtype {self.dtype!r} is not one of {known}, or '' for the model's")

    @property
    def storage_dtype(self) -> jnp.dtype | None:
        """The dtype of cached keys and values; None = that of the model."""
        return jnp.dtype(self.dtype) if self.dtype else None

    def make_policy(self) -> CachePolicy | None:
        """Makes the policy; None for "full", which leaves it to attention to forget what its window has passed."""
        try:
            policy = make_policy(self.policy, budget=self.budget, num_sinks=self.num_sinks)
        except ValueError as error:
            raise ValueError(f"attention.cache: {error}") from error
        return None if self.policy == "full" else policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of attention, read by the layers t and T.

    Attributes:
      num_heads: query heads; 0 only where no layer is attention.
      num_key_heads: heads of keys and values, which divide num_heads; 0 = num_heads.
      head_width: features of a head; 0 = width / num_heads.
      rotary_width: features of each head that are rotated; 0 = none.
      rotary_base: wave length of the slowest rotated pair, over 2 pi.
      rotary_scaling: stretches the slow waves, for sequences longer than those of training; None = as they are.
      window: earlier tokens that are seen; None = all.
      bias: the projections of queries, keys and values have biases.
      qk_norm: queries and keys are normalised per head, before they are rotated.
      cache: tokens that are kept while decoding.
    """

    num_heads: int = 0
    num_key_heads: int = 0
    head_width: int = 0
    rotary_width: int = 0
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling | None = None
    window: int | None = None
    bias: bool = False
    qk_norm: bool = False
    cache: CacheConfig = CacheConfig()

    def __post_init__(self):
        for field in ("num_heads", "num_key_heads", "head_width", "rotary_width"):
            if getattr(self, field) < 0:
                raise ValueError(f"attention.{field} {getattr(self, field)} must not be negative")
        if self.window is not None and self.window < 0:
            raise ValueError(
                f"attention.window {self.window} must be the number of earlier tokens to see, or None for all")
        if self.rotary_base <= 0:
            raise ValueError(f"attention.rotary_base {self.rotary_base} must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrenceConfig:
    """Sizes of recurrent mixers; each reads those that it has a use for.

    Attributes:
      state_size: key dimension of a layer's state; of S5 all of its state.
      expand: inner width over model width.
      head_width: value dimension of a head; there are inner width / head_width heads, or blocks of gates.
      conv_taps: taps of the convolution ahead of the recurrence.
      chunk_size: tokens per step of Mamba-2's chunkwise scan; changes speed, not results.
    """

    state_size: int = 128
    expand: int = 2
    head_width: int = 64
    conv_taps: int = 4
    chunk_size: int = 64

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"recurrence.{field.name} {getattr(self, field.name)} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of residual blocks at one width. Its layers are named by a layout, which stands beside it.

    Attributes:
      width: model width.
      attention, recurrence: sizes of the mixers, read by those that the layout names.
      mixers: configs of mixers that were registered with one of their own; one that is missing has its defaults.
      feed_forward_width: features inside SwiGLU; 0 only where no layer has a capital.
      norm_epsilon: added to the mean square before the root, in every norm of the residual stream, and of
        queries and keys.
      remat: tells the backward pass what to compute again: see `RematPolicy`.
    """

    width: int
    attention: AttentionConfig = AttentionConfig()
    recurrence: RecurrenceConfig = RecurrenceConfig()
    # `kinds` maps the names under which such values are written to their types; see experiments/config/codec.py.
    mixers: tuple[Any, ...] = dataclasses.field(default=(), metadata={"kinds": MIXER_CONFIGS})
    feed_forward_width: int = 0
    norm_epsilon: float = 1e-5
    remat: RematPolicy = "none"

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width {self.width} must be at least 1")
        if self.feed_forward_width < 0:
            raise ValueError(f"feed_forward_width {self.feed_forward_width} must not be negative")
        if self.norm_epsilon <= 0:
            raise ValueError(f"norm_epsilon {self.norm_epsilon} must be above 0")
        if self.remat not in get_args(RematPolicy):
            raise ValueError(f"remat {self.remat!r} is not one of {', '.join(get_args(RematPolicy))}")
        kinds = [type(config) for config in self.mixers]
        for kind in kinds:
            if kind not in MIXER_CONFIGS.values() or kinds.count(kind) > 1:
                known = ", ".join(each.__name__ for each in MIXER_CONFIGS.values())
                raise ValueError(f"mixers has a {kind.__name__}; it holds configs of registered mixers, one of "
                                 f"each: {known or 'no mixer has one'}")

    def mixer_config(self, kind: type[Config]) -> Config:
        """Returns the config of this type in `mixers`, or one with its defaults."""
        return next((config for config in self.mixers if type(config) is kind), kind())

    def check_layouts(self, *layouts: str) -> None:
        """Raises ValueError where a layout names no mixers, or the sizes here do not fit a mixer that it names."""
        for layout in layouts:
            for name, _ in parse_layout(layout):
                mixer = MIXERS[mixer_of(name)]
                if has_feed_forward(name) and self.feed_forward_width < 1:
                    raise ValueError(f"layers with a capital, such as {name!r} in layout {layout!r}, carry a "
                                     "feed-forward network; set feed_forward_width")
                try:
                    if mixer.check is not None:
                        mixer.check(self)
                except ValueError as error:
                    raise ValueError(f"{mixer.description} in layout {layout!r}: {error}") from error
