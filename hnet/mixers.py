"""Our own mixers, registered under the names that layouts have for them.

A mixer of your own is one module, a subclass of `layers.Mixer`, and one `register_mixer`, here or in a package of
yours.
"""
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from hnet.layout import MIXERS, register_mixer
from hnet.stack_config import StackConfig
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
    Mixer,
    NativeSparseAttention,
    RWKV7TimeMix,
    SparseAttention,
    moba_attention,
    moba_in_segments,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoBAConfig:
    """The choice that MoBA makes; its heads and rotary positions are those of `AttentionConfig`.

    Attributes:
      top_k: blocks that a token reads, its own included.
      block: tokens in a block.
    """

    top_k: int = 4
    block: int = 128

    def __post_init__(self):
        _check_at_least_1("mixers.moba", self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeSparseConfig:
    """The choice that native sparse attention makes; heads and rotary positions are those of `AttentionConfig`.

    Attributes:
      num_selected: blocks that a token reads in full: the first, its own, the one before, and others.
      window: earlier tokens that the third branch sees.
      block: tokens in a block.
    """

    num_selected: int = 16
    window: int = 512
    block: int = 64

    def __post_init__(self):
        _check_at_least_1("mixers.nsa", self)
        if self.num_selected < 3:
            raise ValueError(f"mixers.nsa.num_selected {self.num_selected} must be at least 3")


def _check_at_least_1(path: str, config: Any) -> None:
    for field in dataclasses.fields(config):
        if getattr(config, field.name) < 1:
            raise ValueError(f"{path}.{field.name} {getattr(config, field.name)} must be at least 1")


def make_mixer(mixer: str, stack: StackConfig, out_init_std: float, dtype: jnp.dtype, name: str) -> Mixer:
    """Makes the module of `mixer`, a name in MIXERS."""
    return MIXERS[mixer].make(stack, out_init_std=out_init_std, dtype=dtype, name=name)


def _attention(stack: StackConfig, **keywords: Any) -> nn.Module:
    sizes = dict(vars(stack.attention))  # all but the cache have the names that the layer gives them
    cache = sizes.pop("cache")
    return Attention(**sizes, norm_epsilon=stack.norm_epsilon, policy=cache.make_policy(),
                     cache_dtype=cache.storage_dtype, **keywords)


def _sparse(kind: Callable[..., nn.Module], stack: StackConfig, **keywords: Any) -> nn.Module:
    sizes = stack.attention
    return kind(
        num_heads=sizes.num_heads, num_key_heads=sizes.num_key_heads or sizes.num_heads,
        rotary_width=sizes.rotary_width, rotary_base=sizes.rotary_base, rotary_scaling=sizes.rotary_scaling,
        cache_dtype=sizes.cache.storage_dtype, **keywords)


def _moba(stack: StackConfig, **keywords: Any) -> nn.Module:
    choice = dataclasses.asdict(stack.mixer_config(MoBAConfig))
    return _sparse(SparseAttention, stack, attend=partial(moba_attention, **choice),
                   attend_in_segments=partial(moba_in_segments, **choice), **keywords)


def _native_sparse(stack: StackConfig, **keywords: Any) -> nn.Module:
    choice = dataclasses.asdict(stack.mixer_config(NativeSparseConfig))
    return _sparse(NativeSparseAttention, stack, **choice, **keywords)


def _matrix_state(kind: Callable[..., nn.Module], **fixed: Any) -> Callable[..., nn.Module]:
    def make(stack: StackConfig, **keywords: Any) -> nn.Module:
        sizes = stack.recurrence
        return kind(state_size=sizes.state_size, expand=sizes.expand, head_width=sizes.head_width,
                    **fixed, **keywords)

    return make


def _convolved(kind: Callable[..., nn.Module], **fixed: Any) -> Callable[..., nn.Module]:
    def make(stack: StackConfig, **keywords: Any) -> nn.Module:
        return _matrix_state(kind, conv_taps=stack.recurrence.conv_taps, **fixed)(stack, **keywords)

    return make


def _mamba2(stack: StackConfig, **keywords: Any) -> nn.Module:
    return _convolved(Mamba2, chunk_size=stack.recurrence.chunk_size)(stack, **keywords)


def _rwkv7(stack: StackConfig, **keywords: Any) -> nn.Module:
    return RWKV7TimeMix(expand=stack.recurrence.expand, head_width=stack.recurrence.head_width, **keywords)


def _griffin(stack: StackConfig, **keywords: Any) -> nn.Module:
    inner = stack.recurrence.expand * stack.width
    return GriffinRecurrentBlock(
        inner_width=inner, num_heads=inner // stack.recurrence.head_width, conv_taps=stack.recurrence.conv_taps,
        **keywords)


def _s5(stack: StackConfig, **keywords: Any) -> nn.Module:
    return S5(state_size=stack.recurrence.state_size, **keywords)


def _min_gru(stack: StackConfig, **keywords: Any) -> nn.Module:
    return MinGRU(inner_width=stack.recurrence.expand * stack.width, **keywords)


def _check_attention(stack: StackConfig) -> None:
    sizes = stack.attention
    if sizes.num_heads < 1:
        raise ValueError(f"attention.num_heads {sizes.num_heads} must be at least 1")
    if not sizes.head_width and stack.width % sizes.num_heads:
        raise ValueError(f"attention.num_heads {sizes.num_heads} must divide width {stack.width}; change "
                         "attention.num_heads or width, or set attention.head_width")
    if sizes.num_key_heads and sizes.num_heads % sizes.num_key_heads:
        raise ValueError(f"attention.num_heads {sizes.num_heads} is not a multiple of attention.num_key_heads "
                         f"{sizes.num_key_heads}; change one of them")
    head_width = sizes.head_width or stack.width // sizes.num_heads
    if sizes.rotary_width % 2 or sizes.rotary_width > head_width:
        raise ValueError(f"attention.rotary_width {sizes.rotary_width} must be even and at most the head width "
                         f"{head_width}; change attention.rotary_width")


def _check_sparse(stack: StackConfig) -> None:
    _check_attention(stack)
    if stack.width % stack.attention.num_heads:
        raise ValueError(f"attention.num_heads {stack.attention.num_heads} must divide width {stack.width}; "
                         "change one of them")


def _check_heads_of_state(stack: StackConfig) -> None:
    inner, head_width = stack.recurrence.expand * stack.width, stack.recurrence.head_width
    if inner % head_width:
        raise ValueError(f"recurrence.expand * width = {inner} is not a multiple of recurrence.head_width "
                         f"{head_width}; change recurrence.head_width or width")


def _check_s5(stack: StackConfig) -> None:
    if stack.recurrence.state_size % 2:
        raise ValueError(f"recurrence.state_size {stack.recurrence.state_size} must be even: the states of S5 are "
                         "in conjugate pairs")


register_mixer("m", "Mamba-2", _mamba2, check=_check_heads_of_state)
register_mixer("t", "attention", _attention, check=_check_attention)
register_mixer("gdn", "Gated DeltaNet", _convolved(GatedDeltaNet), check=_check_heads_of_state)
register_mixer("gla", "gated linear attention", _matrix_state(GLA), check=_check_heads_of_state)
register_mixer("griffin", "Griffin's recurrent block", _griffin, check=_check_heads_of_state)
register_mixer("gru", "minGRU", _min_gru)
register_mixer("hgrn", "HGRN2", _matrix_state(HGRN2), check=_check_heads_of_state)
register_mixer("kda", "Kimi Delta Attention", _convolved(GatedDeltaNet, decays_per_channel=True),
               check=_check_heads_of_state)
register_mixer("moba", "mixture of block attention", _moba, config=MoBAConfig, check=_check_sparse)
register_mixer("nsa", "native sparse attention", _native_sparse, config=NativeSparseConfig, check=_check_sparse)
register_mixer("mlstm", "the matrix memory of xLSTM", _matrix_state(MLSTM), check=_check_heads_of_state)
register_mixer("rwkv", "RWKV-7's time mix", _rwkv7, check=_check_heads_of_state)
register_mixer("ssm", "S5", _s5, check=_check_s5)
