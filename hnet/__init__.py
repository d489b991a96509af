"""H-Net, a hierarchical language model over bytes, in Flax."""
from hnet.config import HNetConfig, StageConfig
from hnet.decode_state import DecodeState, StageState, init_decode_state
from hnet.generation import generate, generate_text, prefill, step
from hnet.model import HNet, HNetLM, HNetOutput
from hnet.official import load_official_params, parameter_shapes
from hnet.sampling import Sampling, sample
from hnet.stage_output import StageOutput

__all__ = [
    "DecodeState", "HNet", "HNetConfig", "HNetLM", "HNetOutput", "Sampling", "StageConfig", "StageOutput",
    "StageState", "generate", "generate_text", "init_decode_state", "load_official_params", "parameter_shapes",
    "prefill", "sample", "step",
]
