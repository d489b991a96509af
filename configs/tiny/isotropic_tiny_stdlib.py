"""A baseline without hierarchy: Mamba-2 and one attention layer at one width, on the quick start's corpus.

  python -m experiments.train --config=isotropic_tiny_stdlib --workdir=runs/isotropic

Measured: 2 CPU cores, 450 steps, not timed; 1.81 bits per byte on held-out text (one seed, jax 0.10.2, commit
f3c213e). 616,388 parameters, about 2.5 times the weights per byte of the H-Nets beside it.
"""
from experiments.config import DataConfig, OptimizerConfig, RunConfig
from hnet import AttentionConfig, HNetConfig, RecurrenceConfig, StackConfig, StageConfig


def get_config() -> RunConfig:
    stage = StageConfig(encoder="M2T1M2", stack=StackConfig(
        width=96, attention=AttentionConfig(num_heads=4, rotary_width=12),
        recurrence=RecurrenceConfig(state_size=32, chunk_size=32), feed_forward_width=192))
    return RunConfig(
        model=HNetConfig(stages=(stage,)),
        data=DataConfig(source="stdlib", sequence_length=256, batch_size=16),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=20),
        num_steps=450, tokens_per_chunk=(), log_every=10, eval_every=150, checkpoint_every=150,
    )
