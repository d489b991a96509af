"""Common settings of the configs of sizes L and XL: stages of H-Net's widths, and its recipe as far as we know it.

From the paper (arXiv 2507.07955): 256 rows of 8192 bytes, 100 billion tokens of FineWeb-Edu (about 220,000
steps), AdamW, 10 % of the steps to warm up, 20 % to decay as an inverse square root, learning rates per stage by
eq. 11. Betas, weight decay, clipping and the final learning rate are our choice. So is the computation:
precision, slots for chunks, what the backward pass computes again, and the length of a scan's chunk.

Set --config.data.source: the text is the quick start's until you do. On several devices, set --config.model_axis
and --config.optimizer.accumulation_steps to fit; python -m experiments.describe prints what a model needs.
"""
from experiments.config import DataConfig, OptimizerConfig, RunConfig
from hnet import AttentionConfig, ChunkingConfig, HNetConfig, RecurrenceConfig, StackConfig, StageConfig

PEAK_LR_L, PEAK_LR_XL = 6.25e-4, 5e-4
FEED_FORWARD_WIDTH = {1024: 2816, 1536: 4096, 2048: 5504}
NUM_HEADS = 16


def outer_stage(width: int, encoder: str, decoder: str, *, capacity: float, **chunking) -> StageConfig:
    """Makes a stage that chunks, whose attention sees 1024 tokens.

    Args:
      capacity: slots per token, above what is aimed at by as much as rows differ; there are more when they are
        needed, as by a router that has yet to learn.
    """
    grow_to = (2 * capacity, 1.0) if 2 * capacity < 1 else (1.0,)
    return StageConfig(
        encoder=encoder, decoder=decoder, stack=_stack(width, encoder + decoder, window=1023, remat="dots"),
        chunking=ChunkingConfig(capacity=capacity, overflow="grow", grow_to=grow_to, **chunking))


def main_network(width: int, layers: str, *, window: int | None = None) -> StageConfig:
    """Makes the innermost stage, whose attention sees everything unless it has a window."""
    return StageConfig(encoder=layers, stack=_stack(width, layers, window=window, remat="block"))


def paper_run(*stages: StageConfig, peak_lr: float, tokens_per_chunk: tuple[float, ...], **fields) -> RunConfig:
    """Makes a run by the recipe, in bfloat16, for a model of these stages."""
    return RunConfig(
        model=HNetConfig(stages=stages, dtype="bfloat16"),
        data=DataConfig(sequence_length=8192, batch_size=256),
        optimizer=OptimizerConfig(
            peak_lr=peak_lr, schedule="wsd_inverse_sqrt", warmup_steps=0, warmup_fraction=0.1, decay_fraction=0.2,
            stage_lr_rule="paper"),
        num_steps=220_000, tokens_per_chunk=tokens_per_chunk, log_every=50, eval_every=2000, eval_bytes=8_388_608,
        checkpoint_every=2000, **fields,
    )


def _stack(width: int, layers: str, *, window: int | None, remat: str) -> StackConfig:
    has_feed_forward = any(letter in "MT" for letter in layers)
    half_of_each_head = width // NUM_HEADS // 2
    return StackConfig(
        width=width, attention=AttentionConfig(num_heads=NUM_HEADS, rotary_width=half_of_each_head, window=window),
        recurrence=RecurrenceConfig(chunk_size=128),
        feed_forward_width=FEED_FORWARD_WIDTH[width] if has_feed_forward else 0, remat=remat)
