"""Sizes of an H-Net and of its parts: frozen dataclasses, checked where they are made.

  HNetConfig    the whole model: stages, outermost first
  StageConfig   one level of it: layouts of encoder and decoder, their stack, and how the level chunks

The stack is in `hnet.stack_config`: residual blocks at one width, which any model may be made of.
"""
import dataclasses
import math
from typing import Any, Literal, get_args

import jax.numpy as jnp

from hnet.layout import parse_layout
from hnet.stack_config import StackConfig

ROUTERS = {
    "learned": "cosine distance of neighbouring tokens, after learned projections",
    "stride": "every router_stride-th token",
    "space": "after words: at a byte like a space that follows one unlike it; stage 0 only",
    "entropy": "where boundary_lm is unsure of the next byte; stage 0 only",
    "given": "as the caller says, in `boundary_levels`",
}
UPSAMPLERS = {
    "smooth": "moving average over chunks, weighted by their confidence",
    "smooth_tokens": "the same over tokens, after every token got its chunk",
    "none": "the chunk itself",
}
OVERFLOW_POLICIES = {
    "error": "the row's output is NaN, and training stops",
    "grow": "there are as many slots as the first of capacity and grow_to that fits every row: always exact",
    "merge": "they are demoted: their tokens join the chunk before, in training and decoding alike",
}
Downsampler = Literal["first", "mean", "mean_sqrt_length", "max", "last", "attention"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkingConfig:
    """Places where a stage cuts its tokens into chunks, the vectors that it passes inward, and the way back.

    Attributes:
      router: where chunks begin: see ROUTERS.
      router_stride: tokens per chunk of the router "stride".
      entropy_threshold: nats that begin a chunk of the router "entropy".
      downsampler: the vector that represents a chunk: its first, or a summary of the chunk before.
      length_embedding: distinguished lengths of the chunk before, each with a vector that is added to the one of a
        chunk: 0, 1, 2, ... tokens, where 0 is for the first of a segment and longer ones share the last; 0 = none.
      upsampler: reads of the chunks, per token: see UPSAMPLERS.
      capacity: chunk slots per token of this stage; 1 = full, which is always exact.
      overflow: treatment of boundaries past the capacity: see OVERFLOW_POLICIES.
      grow_to: larger capacities for "grow", rising to 1; each is compiled.
      packed: all rows on a device share one buffer of chunks; capacity is of its tokens.
    """

    router: str = "learned"
    router_stride: int = 4
    entropy_threshold: float = 1.3
    downsampler: Downsampler = "first"
    length_embedding: int = 0
    upsampler: str = "smooth"
    capacity: float = 1.0
    overflow: str = "merge"
    grow_to: tuple[float, ...] = (1.0,)
    packed: bool = False

    def __post_init__(self):
        for field, choices in (("router", ROUTERS), ("downsampler", get_args(Downsampler)),
                               ("upsampler", UPSAMPLERS), ("overflow", OVERFLOW_POLICIES)):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} {getattr(self, field)!r} is not one of {', '.join(choices)}")
        if self.router_stride < 2:
            raise ValueError(f"router_stride {self.router_stride} must be at least 2 tokens per chunk")
        if self.length_embedding < 0 or self.length_embedding == 1:
            raise ValueError(f"length_embedding {self.length_embedding} must be 0 (none) or at least 2 lengths")
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity {self.capacity} is a fraction of the stage's tokens, above 0 and up to 1")
        if self.grows:
            capacities = (self.capacity, *self.grow_to)
            if self.grow_to[-1:] != (1.0,) or list(capacities) != sorted(set(capacities)):
                raise ValueError(f"grow_to {self.grow_to} must rise from above capacity {self.capacity} to 1")
        if self.packed and self.overflow == "merge" and self.capacity < 1:
            raise ValueError("packed rows share their slots: overflow 'merge' would demote boundaries of the last "
                             "rows for the sake of the first; set overflow to 'error' or 'grow'")

    @property
    def grows(self) -> bool:
        """Whether the number of slots is chosen for every batch anew."""
        return self.overflow == "grow" and self.capacity < 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One level of the hierarchy: layouts of its encoder and decoder over one stack, and how it chunks.

    Attributes:
      stack: sizes that encoder and decoder share.
      encoder: names in MIXERS, each with a count; a capital adds a feed-forward network: "m4", "gla2T1".
      decoder: the same; "" at the innermost stage, whose encoder is the main network.
      chunking: read where there is a stage within.
    """

    stack: StackConfig
    encoder: str = "m4"
    decoder: str = ""
    chunking: ChunkingConfig = ChunkingConfig()

    def __post_init__(self):
        self.stack.check_layouts(self.encoder, self.decoder)

    @property
    def layers(self) -> frozenset[str]:
        """The names that its layouts have, each once."""
        return frozenset(name for name, _ in parse_layout(self.encoder) + parse_layout(self.decoder))

    def with_stack(self, **changes: Any) -> "StageConfig":
        """Returns the same stage with these fields of its stack replaced."""
        return dataclasses.replace(self, stack=dataclasses.replace(self.stack, **changes))

    def with_chunking(self, **changes: Any) -> "StageConfig":
        """Returns the same stage with these fields of its chunking replaced."""
        return dataclasses.replace(self, chunking=dataclasses.replace(self.chunking, **changes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HNetConfig:
    """A byte-level language model with any number of chunking stages; one stage means none.

    Attributes:
      stages: outermost first; the last is the main network.
      vocab_size: tokens; 256 bytes unless a task has others.
      tie_embeddings: the head is the embedding, transposed.
      context_length: tokens that the model was made to read at once, past which `generate` does not go; None = no
        limit is known.
      dtype: of activations and matmuls; parameters, states and router stay float32. Caches: see `CacheConfig`.
      bfloat16_dechunk: round what smoothing reads to bfloat16, as the release does.
      boundary_lm: for the router "entropy": a frozen model of the same bytes.
    """

    stages: tuple[StageConfig, ...]
    vocab_size: int = 256
    tie_embeddings: bool = False
    context_length: int | None = None
    dtype: Dtype = "float32"
    bfloat16_dechunk: bool = False
    boundary_lm: "HNetConfig | None" = None

    def __post_init__(self):
        if not self.stages:
            raise ValueError("an H-Net needs at least one stage")
        widths = [stage.stack.width for stage in self.stages]
        if widths != sorted(widths):
            raise ValueError(f"stages must not get narrower going inward; widths are {widths}")
        for index, stage in enumerate(self.stages):
            _check_place(index, stage, is_innermost=index == len(self.stages) - 1)
        self._check_merging()
        if self.bfloat16_dechunk and any(stage.chunking.upsampler != "smooth" for stage in self.stages[:-1]):
            raise ValueError("bfloat16_dechunk rounds the smoothing over chunks; set every upsampler to 'smooth'")
        needs_lm = len(self.stages) > 1 and self.stages[0].chunking.router == "entropy"
        if needs_lm != (self.boundary_lm is not None):
            raise ValueError("boundary_lm must be given for stage0.chunking.router 'entropy', and for no other")
        if self.boundary_lm is not None and self.boundary_lm.vocab_size != self.vocab_size:
            raise ValueError(f"boundary_lm.vocab_size {self.boundary_lm.vocab_size} must be vocab_size "
                             f"{self.vocab_size}: both read the same tokens")
        if self.context_length is not None and self.context_length < 1:
            raise ValueError(f"context_length {self.context_length} must be at least 1, or None for no limit")
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(get_args(Dtype))}")

    def _check_merging(self) -> None:
        """Refuses "merge" where the boundaries that it keeps would depend on other rows.

        Training and decoding would then differ.
        """
        rows_are_shared = False
        for index, stage in enumerate(self.stages[:-1]):
            chunking = stage.chunking
            if rows_are_shared and chunking.overflow == "merge" and chunking.capacity < 1:
                raise ValueError(
                    f"stage{index}.chunking.overflow 'merge' within a stage that grows or is packed: which "
                    f"boundaries it keeps would depend on other rows; set stage{index}.chunking.overflow to "
                    "'grow' or 'error', or its capacity to 1")
            rows_are_shared |= chunking.packed or chunking.grows

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    def with_stack(self, **changes: Any) -> "HNetConfig":
        """Returns the same model with these fields of every stage's stack replaced."""
        return dataclasses.replace(self, stages=tuple(stage.with_stack(**changes) for stage in self.stages))

    def with_chunking(self, **changes: Any) -> "HNetConfig":
        """Returns the same model with these fields of every stage's chunking replaced."""
        return dataclasses.replace(self, stages=tuple(stage.with_chunking(**changes) for stage in self.stages))

    def at_full_capacity(self) -> "HNetConfig":
        """Returns the same model with a slot for every token: no boundary is ever demoted, whatever the input."""
        boundary_lm = self.boundary_lm and self.boundary_lm.at_full_capacity()
        return dataclasses.replace(self.with_chunking(capacity=1.0, packed=False), boundary_lm=boundary_lm)


def num_slots(capacity: float, length: int) -> int:
    """Returns the chunk slots of a row, or of a packed buffer, of `length` tokens."""
    return max(1, math.ceil(capacity * length))


def _check_place(index: int, stage: StageConfig, *, is_innermost: bool) -> None:
    if not stage.encoder:
        raise ValueError(f"stage{index}.encoder is empty; name its layers, such as 'm4' or 'T2'")
    if is_innermost and stage.decoder:
        raise ValueError(f"stage{index} is innermost: its encoder is the main network and decoder must be '', "
                         f"not {stage.decoder!r}")
    if not is_innermost and not stage.decoder:
        raise ValueError(f"stage{index}.decoder is empty; only the innermost stage has none")
    if index > 0 and stage.chunking.router in ("space", "entropy") and not is_innermost:
        raise ValueError(f"stage{index}.chunking.router {stage.chunking.router!r} looks at bytes, which only "
                         "stage0 sees")
