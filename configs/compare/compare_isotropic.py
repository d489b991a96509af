"""No chunks: one network over bytes. One of four at equal work per byte: see _compare.py.

  python -m experiments.train --config=compare_isotropic --workdir=runs/flat
"""
from configs.compare._compare import RECURRENCE, run_config
from experiments.config import RunConfig
from hnet import AttentionConfig, StackConfig, StageConfig


def get_config() -> RunConfig:
    stage = StageConfig(encoder="m2t2m2", stack=StackConfig(
        width=64, attention=AttentionConfig(num_heads=4, rotary_width=8), recurrence=RECURRENCE))
    return run_config(stage, tokens_per_chunk=())
