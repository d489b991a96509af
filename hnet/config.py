"""What an H-Net is made of: one frozen dataclass per stage, and one for the whole."""
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

MIXERS = {
    "m": "Mamba-2",
    "t": "attention",
    "gdn": "Gated DeltaNet",
    "gla": "gated linear attention",
    "griffin": "Griffin's recurrent block",
    "gru": "minGRU",
    "hgrn": "HGRN2",
    "kda": "Kimi Delta Attention",
    "mlstm": "the matrix memory of xLSTM",
    "rwkv": "RWKV-7's time mix",
    "ssm": "S5",
}
HAS_HEADS_OF_STATE = frozenset({"m", "gdn", "gla", "griffin", "hgrn", "kda", "mlstm", "rwkv"})
_NAMES = sorted([name for mixer in MIXERS for name in (mixer, mixer.capitalize())], key=len, reverse=True)
LAYOUT_ITEM = re.compile(f"({'|'.join(_NAMES)})([1-9][0-9]*)")
ROUTERS = {
    "learned": "cosine distance of neighbouring tokens, after learned projections",
    "stride": "every router_stride-th token",
    "space": "after words: at a byte like a space that follows one unlike it; stage 0 only",
    "entropy": "where boundary_lm is unsure of the next byte; stage 0 only",
    "given": "as the caller says, in `boundary_levels`",
}
DOWNSAMPLERS = ("first", "mean", "max")
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
REMAT_POLICIES = ("none", "dots", "block")  # nothing; all but matmuls with weights; the whole block


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One level of the hierarchy. Stage 0 is outermost and sees bytes."""

    width: int                  # model width
    encoder: str = "m4"         # names in MIXERS, each with a count; a capital adds a feed-forward: "gla2T1"
    decoder: str = "m4"         # "" at the innermost stage, whose `encoder` is the main network
    router: str = "learned"     # where chunks begin: see ROUTERS
    router_stride: int = 4      # tokens per chunk of the router "stride"
    entropy_threshold: float = 1.3  # nats that begin a chunk of the router "entropy"
    downsampler: str = "first"  # what stands for a chunk: its first vector, or mean or max of the chunk before
    upsampler: str = "smooth"   # what a token reads of the chunks: see UPSAMPLERS
    capacity: float = 1.0       # chunk slots per token of this stage; 1 = full, which is always exact
    overflow: str = "merge"     # what becomes of boundaries past the capacity: see OVERFLOW_POLICIES
    grow_to: tuple[float, ...] = (1.0,)  # larger capacities for "grow", rising to 1; each is compiled
    packed: bool = False        # True: all rows on a device share one buffer of chunks; capacity is of its tokens
    remat: str = "none"         # what the backward pass computes again: see REMAT_POLICIES
    num_heads: int = 0          # attention heads; 0 only where no layer is t or T
    rotary_width: int = 0       # rotated features per attention head
    window: int = -1            # earlier tokens attention sees; -1 = all
    feed_forward_width: int = 0 # features inside SwiGLU; 0 only where no layer has a capital
    ssm_state_size: int = 128   # key dimension of a recurrent layer's state; of S5 all of its state
    ssm_expand: int = 2         # inner width of a recurrent layer over model width
    ssm_head_width: int = 64    # value dimension of a head; inner width / this many heads, or blocks of gates
    ssm_conv_taps: int = 4
    ssm_chunk_size: int = 64    # tokens per step of Mamba-2's chunkwise scan; changes speed, not results

    def __post_init__(self):
        sizes = ("width", "ssm_state_size", "ssm_expand", "ssm_head_width", "ssm_conv_taps", "ssm_chunk_size")
        for field in sizes:
            if getattr(self, field) < 1:
                raise ValueError(f"{field} {getattr(self, field)} must be at least 1")
        names = {name for name, _ in self.encoder_runs + self.decoder_runs}
        mixers = {mixer_of(name) for name in names}
        if "t" in mixers:
            if self.num_heads < 1 or self.width % self.num_heads:
                raise ValueError(
                    f"num_heads {self.num_heads} must divide width {self.width} in a stage with attention "
                    f"({self.encoder!r}, {self.decoder!r}); change num_heads or width")
            if self.rotary_width % 2 or not 0 <= self.rotary_width <= self.width // self.num_heads:
                raise ValueError(
                    f"rotary_width {self.rotary_width} must be even and at most the head width "
                    f"{self.width // self.num_heads}; change rotary_width")
        if any(map(has_feed_forward, names)) and self.feed_forward_width < 1:
            raise ValueError(
                f"layers with a capital ({self.encoder!r}, {self.decoder!r}) carry a feed-forward network; "
                "set feed_forward_width")
        if "ssm" in mixers and self.ssm_state_size % 2:
            raise ValueError(f"ssm_state_size {self.ssm_state_size} must be even in a stage with S5, whose states "
                             "are in conjugate pairs")
        if mixers & HAS_HEADS_OF_STATE and self.ssm_expand * self.width % self.ssm_head_width:
            raise ValueError(
                f"ssm_expand * width = {self.ssm_expand * self.width} is not a multiple of ssm_head_width "
                f"{self.ssm_head_width}; change ssm_head_width or width")
        for field, choices in (("router", ROUTERS), ("downsampler", DOWNSAMPLERS), ("upsampler", UPSAMPLERS),
                               ("overflow", OVERFLOW_POLICIES), ("remat", REMAT_POLICIES)):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} {getattr(self, field)!r} is not one of {', '.join(choices)}")
        if self.router_stride < 2:
            raise ValueError(f"router_stride {self.router_stride} must be at least 2 tokens per chunk")
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity {self.capacity} is a fraction of the stage's tokens, above 0 and up to 1")
        if self.overflow == "grow":
            capacities = (self.capacity, *self.grow_to)
            if self.capacity < 1 and (self.grow_to[-1:] != (1.0,) or list(capacities) != sorted(set(capacities))):
                raise ValueError(f"grow_to {self.grow_to} must rise from above capacity {self.capacity} to 1")
        if self.packed and self.overflow == "merge" and self.capacity < 1:
            raise ValueError("packed rows share their slots: overflow 'merge' would demote boundaries of the last "
                             "rows for the sake of the first; set overflow to 'error' or 'grow'")
        if self.window < -1:
            raise ValueError(f"window {self.window} must be -1 (all) or the number of earlier tokens to see")

    @property
    def encoder_runs(self) -> tuple[tuple[str, int], ...]:
        return parse_layout(self.encoder)

    @property
    def decoder_runs(self) -> tuple[tuple[str, int], ...]:
        return parse_layout(self.decoder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HNetConfig:
    """A byte-level language model with any number of chunking stages; one stage means none."""

    stages: tuple[StageConfig, ...]  # outermost first; the last is the main network
    vocab_size: int = 256
    tie_embeddings: bool = False
    dtype: str = "float32"           # of activations and matmuls; parameters, states and router stay float32
    bfloat16_dechunk: bool = False   # round what smoothing reads to bfloat16, as the release does
    boundary_lm: "HNetConfig | None" = None  # for the router "entropy": a frozen model of the same bytes

    def __post_init__(self):
        if not self.stages:
            raise ValueError("an H-Net needs at least one stage")
        widths = [stage.width for stage in self.stages]
        if widths != sorted(widths):
            raise ValueError(f"stages must not get narrower going inward; widths are {widths}")
        for index, stage in enumerate(self.stages):
            is_innermost = index == len(self.stages) - 1
            if not stage.encoder:
                raise ValueError(f"stage{index}.encoder is empty; name its layers, such as 'm4' or 'T2'")
            if is_innermost and stage.decoder:
                raise ValueError(
                    f"stage{index} is innermost: its encoder is the main network and decoder must be '', "
                    f"not {stage.decoder!r}")
            if not is_innermost and not stage.decoder:
                raise ValueError(f"stage{index}.decoder is empty; only the innermost stage has none")
            if index > 0 and stage.router in ("space", "entropy") and not is_innermost:
                raise ValueError(f"stage{index}.router {stage.router!r} looks at bytes, which only stage0 sees")
        self._check_merging()
        if self.bfloat16_dechunk and any(stage.upsampler != "smooth" for stage in self.stages[:-1]):
            raise ValueError("bfloat16_dechunk rounds the smoothing over chunks; set every upsampler to 'smooth'")
        needs_lm = len(self.stages) > 1 and self.stages[0].router == "entropy"
        if needs_lm != (self.boundary_lm is not None):
            raise ValueError("boundary_lm must be given for stage0.router 'entropy', and for no other")
        if self.boundary_lm is not None and self.boundary_lm.vocab_size != self.vocab_size:
            raise ValueError(f"boundary_lm.vocab_size {self.boundary_lm.vocab_size} must be vocab_size "
                             f"{self.vocab_size}: both read the same tokens")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r} is not one of float32, bfloat16")

    def _check_merging(self) -> None:
        """What 'merge' keeps of a row must depend on the row alone, or training and decoding would differ."""
        rows_are_shared = False
        for index, stage in enumerate(self.stages[:-1]):
            if rows_are_shared and stage.overflow == "merge" and stage.capacity < 1:
                raise ValueError(
                    f"stage{index}.overflow 'merge' within a stage that grows or is packed: which boundaries it "
                    f"keeps would depend on other rows; set stage{index}.overflow to 'grow' or 'error', or its "
                    "capacity to 1")
            rows_are_shared |= stage.packed or (stage.overflow == "grow" and stage.capacity < 1)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "HNetConfig":
        """Builds a config from nested plain values; `stages` maps "stage0", "stage1", ... to their fields.

        Raises:
          ValueError: a field is unknown, or the stages are not numbered from 0.
        """
        fields = dict(fields)
        if "boundary_lm" in fields:  # {} stands for None, which the command line could not write
            fields["boundary_lm"] = cls.from_dict(fields["boundary_lm"]) if fields["boundary_lm"] else None
        stages = dict(fields.pop("stages"))
        names = [f"stage{index}" for index in range(len(stages))]
        if sorted(stages) != sorted(names):
            raise ValueError(f"stages must be named {', '.join(names)}; got {', '.join(sorted(stages))}")
        _refuse_unknown(cls, fields)
        for name in names:
            _refuse_unknown(StageConfig, stages[name], prefix=f"stages.{name}.")
        return cls(stages=tuple(StageConfig(**stages[name]) for name in names), **fields)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["stages"] = {f"stage{index}": dataclasses.asdict(stage) for index, stage in enumerate(self.stages)}
        fields["boundary_lm"] = self.boundary_lm.to_dict() if self.boundary_lm else {}
        return fields

    def with_stages(self, **changes: Any) -> "HNetConfig":
        """The same model with these fields of every stage replaced."""
        return dataclasses.replace(
            self, stages=tuple(dataclasses.replace(stage, **changes) for stage in self.stages))

    def at_full_capacity(self) -> "HNetConfig":
        """The same model with a slot for every token: no boundary is ever demoted, whatever the input."""
        boundary_lm = self.boundary_lm and self.boundary_lm.at_full_capacity()
        return dataclasses.replace(self.with_stages(capacity=1.0, packed=False), boundary_lm=boundary_lm)

    @classmethod
    def from_official_json(cls, text: str, *, dtype: str = "float32", capacity: float = 1.0) -> "HNetConfig":
        """Reads a config file of the official release.

        Args:
          text: the JSON; nested `arch_layout`, and per-stage or shared values for everything else.
          capacity: chunk slots per token, for every stage that chunks; 1 = full.
        Raises:
          ValueError: the text is not such a config.
        """
        official = json.loads(text)
        missing = {"arch_layout", "d_model", "vocab_size"} - set(official)
        if missing:
            raise ValueError(f"not an official H-Net config: it lacks {', '.join(sorted(missing))}")
        layouts = _unnest(official["arch_layout"])
        ssm, attention = official.get("ssm_cfg", {}), official.get("attn_cfg", {})
        stages = []
        for index, (encoder, decoder) in enumerate(layouts):

            def pick(source, key, default, index=index):
                value = source.get(key, default)
                return value[index] if isinstance(value, list) else value

            stages.append(StageConfig(
                width=pick(official, "d_model", None),
                encoder=encoder,
                decoder=decoder,
                capacity=capacity,
                num_heads=pick(attention, "num_heads", 0),
                rotary_width=pick(attention, "rotary_emb_dim", 0),
                window=pick(attention, "window_size", -1),
                # The release rounds the width of SwiGLU up to a multiple of 128.
                feed_forward_width=-(-pick(official, "d_intermediate", 0) // 128) * 128,
                ssm_state_size=pick(ssm, "d_state", 128),
                ssm_expand=pick(ssm, "expand", 2),
                ssm_conv_taps=pick(ssm, "d_conv", 4),
            ))
        return cls(stages=tuple(stages), vocab_size=official["vocab_size"], dtype=dtype,
                   tie_embeddings=official.get("tie_embeddings", False))


def parse_layout(layout: str) -> tuple[tuple[str, int], ...]:
    """Splits "T1m4" into (("T", 1), ("m", 4)).

    Raises:
      ValueError: something other than names in MIXERS, as they are or with a capital, each with a count.
    """
    if LAYOUT_ITEM.sub("", layout):
        raise ValueError(
            f"layout {layout!r} must be names of mixers, each followed by a count, as in 'T1m4' or 'gla2'; mixers "
            f"are {', '.join(MIXERS)}, and with a capital they carry a feed-forward network")
    return tuple((name, int(count)) for name, count in LAYOUT_ITEM.findall(layout))


def mixer_of(name: str) -> str:
    """The key in MIXERS of a name in a layout."""
    return name.lower()


def has_feed_forward(name: str) -> bool:
    """Whether the blocks of that name in a layout have one."""
    return name[0].isupper()


def num_slots(capacity: float, length: int) -> int:
    """Chunk slots of a row, or of a packed buffer, of `length` tokens."""
    return max(1, math.ceil(capacity * length))


def _unnest(layout: list) -> list[tuple[str, str]]:
    """["m4", ["T22"], "m4"] -> [("m4", "m4"), ("T22", "")], outermost first."""
    if len(layout) == 1 and isinstance(layout[0], str):
        return [(layout[0], "")]
    if len(layout) == 3 and isinstance(layout[1], list):
        return [(layout[0], layout[2]), *_unnest(layout[1])]
    raise ValueError(f"arch_layout {layout!r} must be [layers] or [encoder, [inner], decoder]")


def _refuse_unknown(kind: type, fields: Mapping[str, Any], prefix: str = "") -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"unknown model field {prefix}{unknown[0]}; {kind.__name__} has {', '.join(known)}")
