"""Layers for hierarchical and chunked sequence models: functions on arrays, and thin linen modules."""
from layers.arrays.choose import Choice, choose, choose_in_groups
from layers.arrays.segments import (
    carried_segment,
    count_in_segment,
    last_real,
    last_segment,
    segment_ordinals,
    segment_positions,
    segment_starts,
)
from layers.attention.attend import attend
from layers.attention.attended import Attended, merge
from layers.attention.block_lists import BlockLists
from layers.attention.mask import (
    CAUSAL,
    SAME_SEGMENT,
    Bits,
    Causal,
    Mask,
    SameSegment,
    TokenInfo,
    Window,
    token_info,
)
from layers.attention.moba import moba_attention, selected_blocks_attention
from layers.attention.native_sparse import native_sparse_attention
from layers.attention.paged import paged_attention
from layers.attention.patterns import (
    big_bird_attention,
    dilated_attention,
    document_attention,
    sliding_window_attention,
)
from layers.attention.segment_blocks import moba_in_segments, native_sparse_in_segments
from layers.attention.sharded import sharded_attend
from layers.cache.cached_attention import CachedAttention, cached_attention
from layers.cache.kv_cache import KVCache, KVUpdate, Placement, empty_update, place
from layers.cache.policies import POLICIES, KeepAll, KeepRecent, KeepSinksAndRecent, make_policy
from layers.cache.policy import CachePolicy, keep_best
from layers.chunking.chunker import Chunker, ChunkInfo
from layers.chunking.gather import chunk, dechunk, pack_rows, straight_through
from layers.chunking.partition import Partition, pack_segments
from layers.chunking.ratio_loss import ratio_loss
from layers.chunking.routers import (
    CosineRouter,
    GivenRouter,
    RouterHints,
    RouterState,
    SpaceRouter,
    StrideRouter,
    boundary_probability,
    is_spacelike,
)
from layers.chunking.smoothing import smooth
from layers.chunking.summary import (
    PoolingScores,
    PoolState,
    chunk_lengths,
    chunk_pooled,
    summarize,
    summarize_next,
)
from layers.mixers.attention import Attention
from layers.mixers.cached_mixer import CachedMixer
from layers.mixers.gated_delta_net import DeltaNetState, GatedDeltaNet
from layers.mixers.gla import GLA, GLAState
from layers.mixers.griffin import GriffinRecurrentBlock, GriffinState
from layers.mixers.hgrn2 import HGRN2, HGRN2State
from layers.mixers.mamba2 import Mamba2, Mamba2State
from layers.mixers.min_gru import MinGRU, MinGRUState
from layers.mixers.mixer import Mixer
from layers.mixers.mlstm import MLSTM
from layers.mixers.native_sparse_attention import NativeSparseAttention
from layers.mixers.rwkv7 import RWKV7State, RWKV7TimeMix
from layers.mixers.s5 import S5, S5State
from layers.mixers.sparse_attention import SparseAttention
from layers.nn.causal_conv import CausalDepthwiseConv, causal_depthwise_conv
from layers.nn.feed_forward import SwiGLU
from layers.nn.norms import RMSNorm, rms_norm
from layers.nn.rotary import RotaryScaling, rotary
from layers.recurrences.diagonal import diagonal_recurrence
from layers.recurrences.dplr_recurrence import dplr_recurrence
from layers.recurrences.gated_delta_rule import gated_delta_product, gated_delta_rule
from layers.recurrences.gated_linear_attention import gated_linear_attention, rwkv6_recurrence
from layers.recurrences.gated_slot_attention import SlotState, gated_slot_attention
from layers.recurrences.hgrn import hgrn
from layers.recurrences.linear_attention import LinearAttentionState, linear_attention
from layers.recurrences.log_linear_attention import log_linear_attention
from layers.recurrences.min_gru import min_gru
from layers.recurrences.mlstm import MLSTMMemory, mlstm
from layers.recurrences.retention import retention, retention_log_decay
from layers.recurrences.rg_lru import RGLRUState, rg_lru
from layers.recurrences.s4d import s4d, s4d_kernel
from layers.recurrences.s5 import s5
from layers.recurrences.ssd import ssd_scan
from layers.recurrences.state_space import discretize, hippo_legs
from layers.recurrences.ttt_linear import TTTState, ttt_linear

__all__ = [
    "CAUSAL",
    "GLA",
    "HGRN2",
    "MLSTM",
    "POLICIES",
    "S5",
    "SAME_SEGMENT",
    "Attended",
    "Attention",
    "Bits",
    "BlockLists",
    "CachePolicy",
    "CachedAttention",
    "CachedMixer",
    "Causal",
    "CausalDepthwiseConv",
    "Choice",
    "ChunkInfo",
    "Chunker",
    "CosineRouter",
    "DeltaNetState",
    "GLAState",
    "GatedDeltaNet",
    "GivenRouter",
    "GriffinRecurrentBlock",
    "GriffinState",
    "HGRN2State",
    "KVCache",
    "KVUpdate",
    "KeepAll",
    "KeepRecent",
    "KeepSinksAndRecent",
    "LinearAttentionState",
    "MLSTMMemory",
    "Mamba2",
    "Mamba2State",
    "Mask",
    "MinGRU",
    "MinGRUState",
    "Mixer",
    "NativeSparseAttention",
    "Partition",
    "Placement",
    "PoolState",
    "PoolingScores",
    "RGLRUState",
    "RMSNorm",
    "RWKV7State",
    "RWKV7TimeMix",
    "RotaryScaling",
    "RouterHints",
    "RouterState",
    "S5State",
    "SameSegment",
    "SlotState",
    "SpaceRouter",
    "SparseAttention",
    "StrideRouter",
    "SwiGLU",
    "TTTState",
    "TokenInfo",
    "Window",
    "attend",
    "big_bird_attention",
    "boundary_probability",
    "cached_attention",
    "carried_segment",
    "causal_depthwise_conv",
    "choose",
    "choose_in_groups",
    "chunk",
    "chunk_lengths",
    "chunk_pooled",
    "count_in_segment",
    "dechunk",
    "diagonal_recurrence",
    "dilated_attention",
    "discretize",
    "document_attention",
    "dplr_recurrence",
    "empty_update",
    "gated_delta_product",
    "gated_delta_rule",
    "gated_linear_attention",
    "gated_slot_attention",
    "hgrn",
    "hippo_legs",
    "is_spacelike",
    "keep_best",
    "last_real",
    "last_segment",
    "linear_attention",
    "log_linear_attention",
    "make_policy",
    "merge",
    "min_gru",
    "mlstm",
    "moba_attention",
    "moba_in_segments",
    "native_sparse_attention",
    "native_sparse_in_segments",
    "pack_rows",
    "pack_segments",
    "paged_attention",
    "place",
    "ratio_loss",
    "retention",
    "retention_log_decay",
    "rg_lru",
    "rms_norm",
    "rotary",
    "rwkv6_recurrence",
    "s4d",
    "s4d_kernel",
    "s5",
    "segment_ordinals",
    "segment_positions",
    "segment_starts",
    "selected_blocks_attention",
    "sharded_attend",
    "sliding_window_attention",
    "smooth",
    "ssd_scan",
    "straight_through",
    "summarize",
    "summarize_next",
    "token_info",
    "ttt_linear",
]
