"""Layers for hierarchical and chunked sequence models: functions on arrays, and thin linen modules."""
from layers.attention import (
    Attention,
    KVCache,
    KVUpdate,
    cached_attention,
    dot_product_attention,
    masked_attention,
)
from layers.causal_conv import CausalDepthwiseConv, causal_depthwise_conv
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
from layers.mamba2 import Mamba2, Mamba2State
from layers.norms import RMSNorm, rms_norm
from layers.ratio_loss import ratio_loss
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
from layers.segments import last_real, segment_ordinals, segment_positions, segment_starts
from layers.smoothing import smooth
from layers.ssd import ssd_scan

__all__ = [
    "Attention", "CausalDepthwiseConv", "ChunkPlan", "CosineRouter", "GivenRouter", "KVCache", "KVUpdate",
    "Mamba2", "Mamba2State", "PoolState", "RMSNorm", "RouterHints", "RouterState", "SpaceRouter",
    "StrideRouter", "SwiGLU", "assign_chunks", "boundary_probability", "cached_attention",
    "causal_depthwise_conv", "chunk", "chunk_pooled", "dechunk", "dot_product_attention", "is_spacelike",
    "last_real", "masked_attention", "pack_rows", "pack_segments", "ratio_loss", "rms_norm", "rotary",
    "segment_ordinals", "segment_positions", "segment_starts", "smooth", "ssd_scan", "straight_through",
]
