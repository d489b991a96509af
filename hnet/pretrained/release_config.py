"""The official release's config file, which describes a model stage by stage as `HNetConfig` does."""
import json
from collections.abc import Mapping
from typing import Any

from hnet.config import ChunkingConfig, HNetConfig, StageConfig
from hnet.layout import has_feed_forward, mixer_of
from hnet.stack_config import AttentionConfig, RecurrenceConfig, StackConfig


def from_official_json(text: str, *, dtype: str = "float32", capacity: float = 1.0) -> HNetConfig:
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
    stages = tuple(
        StageConfig(stack=_stack(official, index), encoder=encoder, decoder=decoder,
                    chunking=ChunkingConfig(capacity=capacity))
        for index, (encoder, decoder) in enumerate(layouts))
    return HNetConfig(stages=stages, vocab_size=official["vocab_size"], dtype=dtype,
                      tie_embeddings=official.get("tie_embeddings", False))


def to_official_json(config: HNetConfig) -> str:
    """Writes the release's config file: the inverse of `from_official_json`, but for how to compute.

    The release has no words for capacity, overflow, dtype and the like, which change no parameter. Its chunk_size
    of Mamba-2's scan changes no result either; it is always 256 here.

    Raises:
      ValueError: `config` is of a model that the release does not have.
    """
    refuse_unofficial(config)
    stages = config.stages
    layout: list[Any] = [stages[-1].encoder]
    for stage in reversed(stages[:-1]):
        layout = [stage.encoder, layout, stage.decoder]

    def shared(field: str) -> int | list[int]:
        values = [getattr(stage.stack.recurrence, field) for stage in stages]
        return values[0] if len(set(values)) == 1 else values

    windows = [stage.stack.attention.window for stage in stages]
    return json.dumps({
        "arch_layout": layout,
        "d_model": [stage.stack.width for stage in stages],
        "d_intermediate": [stage.stack.feed_forward_width if _has_feed_forward(stage) else 0 for stage in stages],
        "vocab_size": config.vocab_size,
        "ssm_cfg": {
            "chunk_size": 256, "d_conv": shared("conv_taps"), "d_state": shared("state_size"),
            "expand": shared("expand")},
        "attn_cfg": {
            "num_heads": [stage.stack.attention.num_heads for stage in stages],
            "rotary_emb_dim": [stage.stack.attention.rotary_width for stage in stages],
            "window_size": [-1 if window is None else window for window in windows]},
        "tie_embeddings": config.tie_embeddings,
    }, indent=2)


def refuse_unofficial(config: HNetConfig) -> None:
    """Raises ValueError for the first field of `config` that the release has no word for."""
    for index, stage in enumerate(config.stages):
        mixers = {mixer_of(name) for name in stage.layers}
        if mixers - {"m", "t"}:
            raise ValueError(f"the official format has no word for the mixer {min(mixers - {'m', 't'})!r} of "
                             f"stage{index}: its layers are Mamba-2 (m) and attention (t)")
        fixed: dict[str, Any] = {"stack.norm_epsilon": StackConfig(width=1).norm_epsilon}
        if stage.decoder:
            only = {"router": "learned", "downsampler": "first", "upsampler": "smooth"}
            fixed |= {f"chunking.{field}": value for field, value in only.items()}
        if "m" in mixers:
            fixed["stack.recurrence.head_width"] = 64
        if "t" in mixers:
            plain, own_sizes = AttentionConfig(), ("num_heads", "rotary_width", "window")
            fixed |= {f"stack.attention.{field}": value for field, value in vars(plain).items()
                      if field not in own_sizes}
        for field, only in fixed.items():
            if _get(stage, field) != only:
                raise ValueError(f"the official format has no word for stage{index}.{field} "
                                 f"{_get(stage, field)!r}: it is always {only!r} there")
        # The release rounds the first up and has no word for what it was; its smoothing kernel takes heads of 32.
        multiples = {"stack.feed_forward_width": 128} if _has_feed_forward(stage) else {}
        multiples |= {"stack.width": 32} if stage.decoder else {}
        for field, multiple in multiples.items():
            if _get(stage, field) % multiple:
                raise ValueError(f"the official format needs a stage{index}.{field} that is a multiple of "
                                 f"{multiple}, not {_get(stage, field)}")


def _stack(official: Mapping[str, Any], index: int) -> StackConfig:
    ssm, attention = official.get("ssm_cfg", {}), official.get("attn_cfg", {})

    def pick(source: Mapping[str, Any], key: str, default: Any) -> Any:
        value = source.get(key, default)
        return value[index] if isinstance(value, list) else value

    window = pick(attention, "window_size", -1)
    return StackConfig(
        width=pick(official, "d_model", None),
        attention=AttentionConfig(
            num_heads=pick(attention, "num_heads", 0),
            rotary_width=pick(attention, "rotary_emb_dim", 0),
            window=None if window == -1 else window),
        recurrence=RecurrenceConfig(
            state_size=pick(ssm, "d_state", 128), expand=pick(ssm, "expand", 2), conv_taps=pick(ssm, "d_conv", 4)),
        # The release rounds the width of SwiGLU up to a multiple of 128.
        feed_forward_width=-(-pick(official, "d_intermediate", 0) // 128) * 128)


def _unnest(layout: list) -> list[tuple[str, str]]:
    """["m4", ["T22"], "m4"] -> [("m4", "m4"), ("T22", "")], outermost first."""
    if len(layout) == 1 and isinstance(layout[0], str):
        return [(layout[0], "")]
    if len(layout) == 3 and isinstance(layout[1], list):
        return [(layout[0], layout[2]), *_unnest(layout[1])]
    raise ValueError(f"arch_layout {layout!r} must be [layers] or [encoder, [inner], decoder]")


def _has_feed_forward(stage: StageConfig) -> bool:
    return any(map(has_feed_forward, stage.layers))


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config
