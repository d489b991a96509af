"""Which mixer a layer has, by its name in a layout. A mixer of your own: a module, a line here, and one in MIXERS.

A mixer is called with (x [b, t, d], segment_ids [b, t], state or None) and returns (y [b, t, d], update), where
the update is the state after the last real token, or for attention what its cache grows by. All sizes that it
needs are fields of its stage.
"""
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from hnet.config import StageConfig
from layers import (
    GLA,
    HGRN2,
    MLSTM,
    S5,
    Attention,
    GatedDeltaNet,
    GriffinRecurrentBlock,
    Mamba2,
    MinGRU,
    RWKV7TimeMix,
)


def make_mixer(mixer: str, stage: StageConfig, out_init_std: float, dtype: jnp.dtype, name: str) -> nn.Module:
    """Makes the module of `mixer`, one of `hnet.config.MIXERS`."""
    return _MAKE[mixer](stage, out_init_std=out_init_std, dtype=dtype, name=name)


def empty_mixer_state(mixer: str, stage: StageConfig, batch: int, max_length: int, dtype: jnp.dtype) -> Any:
    """Its state before the first token; attention holds up to `max_length` tokens a row."""
    return make_mixer(mixer, stage, 0.0, dtype, "mixer").empty_state(batch, stage.width, max_length)


def _attention(stage: StageConfig, **keywords: Any) -> nn.Module:
    return Attention(
        num_heads=stage.num_heads, rotary_width=stage.rotary_width,
        window=None if stage.window < 0 else stage.window, **keywords)


def _matrix_state(kind: Callable[..., nn.Module], **fixed: Any) -> Callable[..., nn.Module]:
    def make(stage: StageConfig, **keywords: Any) -> nn.Module:
        return kind(state_size=stage.ssm_state_size, expand=stage.ssm_expand, head_width=stage.ssm_head_width,
                    **fixed, **keywords)

    return make


def _convolved(kind: Callable[..., nn.Module], **fixed: Any) -> Callable[..., nn.Module]:
    def make(stage: StageConfig, **keywords: Any) -> nn.Module:
        return _matrix_state(kind, conv_taps=stage.ssm_conv_taps, **fixed)(stage, **keywords)

    return make


def _mamba2(stage: StageConfig, **keywords: Any) -> nn.Module:
    return _convolved(Mamba2, chunk_size=stage.ssm_chunk_size)(stage, **keywords)


def _rwkv7(stage: StageConfig, **keywords: Any) -> nn.Module:
    return RWKV7TimeMix(expand=stage.ssm_expand, head_width=stage.ssm_head_width, **keywords)


def _griffin(stage: StageConfig, **keywords: Any) -> nn.Module:
    inner = stage.ssm_expand * stage.width
    return GriffinRecurrentBlock(
        inner_width=inner, num_heads=inner // stage.ssm_head_width, conv_taps=stage.ssm_conv_taps, **keywords)


def _s5(stage: StageConfig, **keywords: Any) -> nn.Module:
    return S5(state_size=stage.ssm_state_size, **keywords)


def _min_gru(stage: StageConfig, **keywords: Any) -> nn.Module:
    return MinGRU(inner_width=stage.ssm_expand * stage.width, **keywords)


_MAKE = {
    "m": _mamba2,
    "t": _attention,
    "gdn": _convolved(GatedDeltaNet),
    "gla": _matrix_state(GLA),
    "griffin": _griffin,
    "gru": _min_gru,
    "hgrn": _matrix_state(HGRN2),
    "kda": _convolved(GatedDeltaNet, decays_per_channel=True),
    "mlstm": _matrix_state(MLSTM),
    "rwkv": _rwkv7,
    "ssm": _s5,
}
