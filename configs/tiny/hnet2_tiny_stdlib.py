"""Two-stage H-Net: bytes to chunks to chunks of chunks, on the quick start's corpus.

  python -m experiments.train --config=hnet2_tiny_stdlib --workdir=runs/hnet2

Measured: 2 CPU cores, 450 steps, not timed; 2.12 bits per byte on held-out text (one seed, jax 0.10.2, commit
f3c213e). 832,714 parameters.
"""
from experiments.config import DataConfig, OptimizerConfig, RunConfig
from hnet import AttentionConfig, ChunkingConfig, HNetConfig, RecurrenceConfig, StackConfig, StageConfig


def get_config() -> RunConfig:
    recurrence = RecurrenceConfig(state_size=32, chunk_size=32)
    stages = (
        StageConfig(
            encoder="m2", decoder="m2", chunking=ChunkingConfig(capacity=0.75),
            stack=StackConfig(width=64, recurrence=recurrence)),
        StageConfig(
            encoder="T1m1", decoder="m1T1", chunking=ChunkingConfig(capacity=0.85),
            stack=StackConfig(
                width=96, attention=AttentionConfig(num_heads=4, rotary_width=12, window=63),
                recurrence=recurrence, feed_forward_width=192)),
        StageConfig(encoder="T2", stack=StackConfig(
            width=128, attention=AttentionConfig(num_heads=4, rotary_width=16), feed_forward_width=256)),
    )
    return RunConfig(
        model=HNetConfig(stages=stages),
        data=DataConfig(source="stdlib", sequence_length=256, batch_size=16),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=20),
        num_steps=450, tokens_per_chunk=(2.5, 2.5), log_every=10, eval_every=150, checkpoint_every=150,
    )
