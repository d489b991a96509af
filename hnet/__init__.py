"""H-Net, a hierarchical language model over bytes, in Flax."""
from hnet.config import HNetConfig, StageConfig
from hnet.decode_state import StageState, init_decode_state
from hnet.generation import Sampling, generate
from hnet.model import HNet, HNetLM, HNetOutput, StageOutput
from hnet.official import load_official_params, parameter_shapes

__all__ = [
    "HNet", "HNetConfig", "HNetLM", "HNetOutput", "Sampling", "StageConfig", "StageOutput", "StageState",
    "generate", "init_decode_state", "load_official_params", "parameter_shapes",
]
