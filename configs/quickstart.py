"""One-stage H-Net of half a million parameters on the source code and prose that come with Python.

  make train     or     python -m experiments.train --config=quickstart --workdir=runs/quickstart
"""
from experiments.config import DataConfig, OptimizerConfig, RunConfig
from hnet import HNetConfig, StageConfig


def get_config():
    stages = (
        StageConfig(
            width=64, encoder="m2", decoder="m2", capacity=0.625,
            ssm_state_size=32, ssm_head_width=64, ssm_chunk_size=32),
        StageConfig(
            width=128, encoder="T2", decoder="", num_heads=4, rotary_width=16, feed_forward_width=256),
    )
    return RunConfig(
        model=HNetConfig(stages=stages),
        data=DataConfig(source="stdlib", sequence_length=256, batch_size=16),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=20),
        num_steps=400, tokens_per_chunk=(4.0,), log_every=10, eval_every=100, checkpoint_every=100,
    ).to_config_dict()
