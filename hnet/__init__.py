"""H-Net, a hierarchical language model over bytes, in Flax."""
from hnet.config import ChunkingConfig, HNetConfig, StageConfig
from hnet.decode_state import DecodeState, StageState, decode_state_bytes, init_decode_state
from hnet.generation import BOS, generate, generate_text, prefill, step
from hnet.layout import register_mixer, residual_depth
from hnet.model import HNet, HNetLM, HNetOutput
from hnet.pretrained.hnet_release import load_official_params, to_official_params
from hnet.pretrained.llama import load_llama_params, to_llama_params
from hnet.pretrained.llama_config import llama_config, to_llama_config
from hnet.pretrained.relabel import parameter_shapes
from hnet.pretrained.release_config import from_official_json, to_official_json
from hnet.sampling import Sampling, sample
from hnet.stack import Stack
from hnet.stack_config import AttentionConfig, RecurrenceConfig, StackConfig
from hnet.stage_output import StageOutput

__all__ = [
    "BOS",
    "AttentionConfig",
    "ChunkingConfig",
    "DecodeState",
    "HNet",
    "HNetConfig",
    "HNetLM",
    "HNetOutput",
    "RecurrenceConfig",
    "Sampling",
    "Stack",
    "StackConfig",
    "StageConfig",
    "StageOutput",
    "StageState",
    "decode_state_bytes",
    "from_official_json",
    "generate",
    "generate_text",
    "init_decode_state",
    "llama_config",
    "load_llama_params",
    "load_official_params",
    "parameter_shapes",
    "prefill",
    "register_mixer",
    "residual_depth",
    "sample",
    "step",
    "to_llama_config",
    "to_llama_params",
    "to_official_json",
    "to_official_params",
]
