"""Layers for hierarchical and chunked sequence models: functions on arrays, and thin linen modules."""
from layers.attention import (
    Attention,
    KVCache,
    KVUpdate,
    cached_attention,
    dot_product_attention,
    masked_attention,
)
from layers.block_lists import BlockLists
from layers.block_sparse_attention import (
    block_sparse_attention,
    merge_by_lse,
    sharded_block_sparse_attention,
)
from layers.causal_conv import CausalDepthwiseConv, causal_depthwise_conv
from layers.diagonal_recurrence import diagonal_recurrence
from layers.dplr_recurrence import dplr_recurrence
from layers.dynamic_chunking import (
    ChunkPlan,
    PoolState,
    assign_chunks,
    chunk,
    chunk_pooled,
    dechunk,
    pack_rows,
    pack_segments,
    straight_through,
)
from layers.feed_forward import SwiGLU
from layers.gated_delta_net import DeltaNetState, GatedDeltaNet
from layers.gated_delta_rule import gated_delta_product, gated_delta_rule
from layers.gated_linear_attention import gated_linear_attention, rwkv6_recurrence
from layers.gated_slot_attention import SlotState, gated_slot_attention
from layers.gla import GLA, GLAState
from layers.griffin import GriffinRecurrentBlock, GriffinState
from layers.hgrn import hgrn
from layers.hgrn2 import HGRN2, HGRN2State
from layers.linear_attention import LinearAttentionState, linear_attention
from layers.log_linear_attention import log_linear_attention
from layers.mamba2 import Mamba2, Mamba2State
from layers.mask_spec import MaskSpec, pack_row_select
from layers.min_gru import MinGRU, MinGRUState, min_gru
from layers.mlstm import MLSTM, MLSTMMemory, mlstm
from layers.native_sparse_attention import NativeSparseAttention, native_sparse_attention
from layers.norms import RMSNorm, rms_norm
from layers.ratio_loss import ratio_loss
from layers.retention import retention, retention_log_decay
from layers.rg_lru import RGLRUState, rg_lru
from layers.rotary import rotary
from layers.routers import (
    CosineRouter,
    GivenRouter,
    RouterHints,
    RouterState,
    SpaceRouter,
    StrideRouter,
    boundary_probability,
    is_spacelike,
)
from layers.rwkv7 import RWKV7State, RWKV7TimeMix
from layers.s4d import s4d, s4d_kernel
from layers.s5 import S5, S5State, s5
from layers.segments import last_real, segment_ordinals, segment_positions, segment_starts
from layers.smoothing import smooth
from layers.sparse_attention import (
    SparseAttention,
    big_bird_attention,
    dilated_attention,
    document_attention,
    moba_attention,
    paged_attention,
    selected_blocks_attention,
    sliding_window_attention,
)
from layers.ssd import ssd_scan
from layers.state_space import discretize, hippo_legs
from layers.ttt_linear import TTTState, ttt_linear

__all__ = [
    "GLA", "HGRN2", "MLSTM", "S5", "Attention", "BlockLists", "CausalDepthwiseConv", "ChunkPlan",
    "CosineRouter", "DeltaNetState", "GLAState", "GatedDeltaNet", "GivenRouter", "GriffinRecurrentBlock",
    "GriffinState", "HGRN2State", "KVCache", "KVUpdate", "LinearAttentionState", "MLSTMMemory", "Mamba2",
    "Mamba2State", "MaskSpec", "MinGRU", "MinGRUState", "NativeSparseAttention", "PoolState", "RGLRUState",
    "RMSNorm", "RWKV7State", "RWKV7TimeMix", "RouterHints", "RouterState", "S5State", "SlotState",
    "SpaceRouter", "SparseAttention", "StrideRouter", "SwiGLU", "TTTState", "assign_chunks",
    "big_bird_attention", "block_sparse_attention", "boundary_probability", "cached_attention",
    "causal_depthwise_conv", "chunk", "chunk_pooled", "dechunk", "diagonal_recurrence", "dilated_attention",
    "discretize", "document_attention", "dot_product_attention", "dplr_recurrence", "gated_delta_product",
    "gated_delta_rule", "gated_linear_attention", "gated_slot_attention", "hgrn", "hippo_legs",
    "is_spacelike", "last_real", "linear_attention", "log_linear_attention", "masked_attention",
    "merge_by_lse", "min_gru", "mlstm", "moba_attention", "native_sparse_attention", "pack_row_select",
    "pack_rows", "pack_segments", "paged_attention", "ratio_loss", "retention", "retention_log_decay",
    "rg_lru", "rms_norm", "rotary", "rwkv6_recurrence", "s4d", "s4d_kernel", "s5", "segment_ordinals",
    "segment_positions", "segment_starts", "selected_blocks_attention", "sharded_block_sparse_attention",
    "sliding_window_attention", "smooth", "ssd_scan", "straight_through", "ttt_linear",
]
