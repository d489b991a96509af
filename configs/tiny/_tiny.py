"""What the small versions of published designs share: the quick start's corpus, budget and optimiser, and a stage.

They are about as large as the quick start and made of our parts: each is like its model in where chunks begin and
in what stands for a chunk, and its docstring says where it differs.
"""
from ml_collections import ConfigDict

from experiments.config import DataConfig, OptimizerConfig, RunConfig
from hnet import HNetConfig, StageConfig

NUM_HEADS = 4


def attention_stage(width: int, encoder: str, decoder: str = "", **fields) -> StageConfig:
    """A stage of attention whose feed-forward networks are twice as wide; half of each head is rotated."""
    return StageConfig(
        width=width, encoder=encoder, decoder=decoder, num_heads=NUM_HEADS, rotary_width=width // NUM_HEADS // 2,
        feed_forward_width=2 * width, **fields)


def byte_stage(encoder: str, decoder: str, *, capacity: float, **fields) -> StageConfig:
    """The outermost stage: its attention sees 64 bytes, and there are more slots where `capacity` does not do."""
    return attention_stage(64, encoder, decoder, window=63, capacity=capacity, overflow="grow", **fields)


def tiny_run(model: HNetConfig, *, tokens_per_chunk: tuple[float, ...], **fields) -> ConfigDict:
    """400 steps on 16 rows of 256 bytes. No loss on the ratio: where chunks begin is a rule."""
    return RunConfig(
        model=model, data=DataConfig(source="stdlib", sequence_length=256, batch_size=16),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=20), num_steps=400,
        tokens_per_chunk=tokens_per_chunk, ratio_objective="none", log_every=10, eval_every=100,
        checkpoint_every=100, **fields,
    ).to_config_dict()


def blt_boundary_lm() -> HNetConfig:
    """The small model of bytes by whose doubts blt_tiny_stdlib cuts; blt_boundary_lm_tiny_stdlib trains it."""
    return HNetConfig(stages=(attention_stage(64, "T2", window=63),))
