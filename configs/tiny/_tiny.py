"""Small versions of published designs: the corpus, budget and optimiser of the quick start, and their stages.

They are about as large as the quick start and made of our parts: each resembles its model in where chunks begin
and in the vector that represents a chunk, and its docstring says where it differs.
"""
from experiments.config import DataConfig, OptimizerConfig, RunConfig
from hnet import AttentionConfig, ChunkingConfig, HNetConfig, StackConfig, StageConfig

NUM_HEADS = 4


def attention_stage(
    width: int, encoder: str, decoder: str = "", *, window: int | None = None, **chunking
) -> StageConfig:
    """Makes a stage of attention whose feed-forward networks are twice as wide; half of each head is rotated."""
    attention = AttentionConfig(num_heads=NUM_HEADS, rotary_width=width // NUM_HEADS // 2, window=window)
    return StageConfig(
        stack=StackConfig(width=width, attention=attention, feed_forward_width=2 * width),
        encoder=encoder, decoder=decoder, chunking=ChunkingConfig(**chunking))


def byte_stage(encoder: str, decoder: str, *, capacity: float, **chunking) -> StageConfig:
    """Makes the outermost stage: its attention sees 64 bytes, and `capacity` grows where it is too small."""
    return attention_stage(64, encoder, decoder, window=63, capacity=capacity, overflow="grow", **chunking)


def tiny_run(model: HNetConfig, *, tokens_per_chunk: tuple[float, ...], **fields) -> RunConfig:
    """Makes a run of 400 steps on 16 rows of 256 bytes, with no loss on the ratio: a rule says where to cut."""
    return RunConfig(
        model=model, data=DataConfig(source="stdlib", sequence_length=256, batch_size=16),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=20), num_steps=400,
        tokens_per_chunk=tokens_per_chunk, ratio_objective="none", log_every=10, eval_every=100,
        checkpoint_every=100, **fields,
    )


def blt_boundary_lm() -> HNetConfig:
    """Makes the small model of bytes by whose doubts blt_tiny_stdlib cuts. Its own config trains it."""
    return HNetConfig(stages=(attention_stage(64, "T2", window=63),))
