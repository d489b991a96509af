"""Layers for hierarchical and chunked sequence models: functions on arrays, and thin linen modules."""
from layers.attention import Attention, KVCache, dot_product_attention, masked_attention
from layers.causal_conv import CausalDepthwiseConv, causal_depthwise_conv
from layers.dynamic_chunking import (
    ChunkPlan,
    Router,
    RouterState,
    assign_chunks,
    boundary_probability,
    chunk,
    dechunk,
    ratio_loss,
    smooth,
    straight_through,
)
from layers.feed_forward import SwiGLU
from layers.mamba2 import Mamba2, Mamba2State
from layers.norms import RMSNorm, rms_norm
from layers.rotary import rotary
from layers.segments import last_real, segment_ordinals, segment_positions, segment_starts
from layers.ssd import ssd_scan

__all__ = [
    "Attention", "CausalDepthwiseConv", "ChunkPlan", "KVCache", "Mamba2", "Mamba2State", "RMSNorm", "Router",
    "RouterState", "SwiGLU", "assign_chunks", "boundary_probability", "causal_depthwise_conv", "chunk",
    "dechunk", "dot_product_attention", "last_real", "masked_attention", "ratio_loss", "rms_norm", "rotary",
    "segment_ordinals", "segment_positions", "segment_starts", "smooth", "ssd_scan", "straight_through",
]
