"""H-Net, a hierarchical language model over bytes, in Flax."""
from hnet.config import HNetConfig, StageConfig
from hnet.decode_state import DecodeState, StageState, init_decode_state
from hnet.generation import BOS, generate, generate_text, prefill, step
from hnet.model import HNet, HNetLM, HNetOutput
from hnet.pretrained.hnet_release import (
    load_official_params,
    parameter_shapes,
    to_official_json,
    to_official_params,
)
from hnet.sampling import Sampling, sample
from hnet.stage_output import StageOutput

__all__ = [
    "BOS", "DecodeState", "HNet", "HNetConfig", "HNetLM", "HNetOutput", "Sampling", "StageConfig",
    "StageOutput", "StageState", "generate", "generate_text", "init_decode_state", "load_official_params",
    "parameter_shapes", "prefill", "sample", "step", "to_official_json", "to_official_params",
]
