"""No chunks: one network over bytes. One of four at equal work per byte: see _compare.py.

  python -m experiments.train --config=compare_isotropic --workdir=runs/flat

Measured: 1 CPU device beside other work, 553 s of train steps; 2.140 ± 0.014 bits per byte on held-out text
(three seeds, jax 0.10.2, commits 60a8992 and 7570878). 185,560 parameters.
"""
from configs.compare._compare import RECURRENCE, run_config
from experiments.config import RunConfig
from hnet import AttentionConfig, StackConfig, StageConfig


def get_config() -> RunConfig:
    stage = StageConfig(encoder="m2t2m2", stack=StackConfig(
        width=64, attention=AttentionConfig(num_heads=4, rotary_width=8), recurrence=RECURRENCE))
    return run_config(stage, tokens_per_chunk=())
