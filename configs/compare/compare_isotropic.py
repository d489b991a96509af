"""No chunks: one network over bytes. One of four at equal work per byte: see _compare.py.

  python -m experiments.train --config=compare_isotropic --workdir=runs/flat
"""
from configs.compare._compare import run_config
from hnet import StageConfig


def get_config():
    stage = StageConfig(
        width=64, encoder="m2t2m2", decoder="", num_heads=4, rotary_width=8,
        ssm_state_size=32, ssm_head_width=64, ssm_chunk_size=32)
    return run_config(stage, tokens_per_chunk=())
