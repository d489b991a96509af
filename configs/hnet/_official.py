"""What the configs of sizes L and XL share: stages of H-Net's widths, and its recipe as far as we know it.

From the paper (arXiv 2507.07955): 256 rows of 8192 bytes, 100 billion tokens of FineWeb-Edu (some 220,000 steps),
AdamW, 10 % of the steps to warm up, 20 % to decay as an inverse square root, learning rates per stage by eq. 11.
Betas, weight decay, clipping and the last learning rate are our choice. So is how it is computed: precision, slots
for chunks, what the backward pass computes again, and the length of a scan's chunk.

Set --config.data.source: the text is the quick start's until you do. On several devices, set --config.model_axis
and --config.optimizer.accumulation_steps to what fits; python -m experiments.describe says what a model needs.
"""
from ml_collections import ConfigDict

from experiments.config import DataConfig, OptimizerConfig, RunConfig
from hnet import HNetConfig, StageConfig

PEAK_LR_L, PEAK_LR_XL = 6.25e-4, 5e-4
FEED_FORWARD_WIDTH = {1024: 2816, 1536: 4096, 2048: 5504}
NUM_HEADS = 16


def outer_stage(width: int, encoder: str, decoder: str, *, capacity: float, **fields) -> StageConfig:
    """A stage that chunks, whose attention sees 1024 tokens.

    Args:
      capacity: slots per token, above what is aimed at by as much as rows differ; there are more when they are
        needed, as by a router that has yet to learn.
    """
    grow_to = (2 * capacity, 1.0) if 2 * capacity < 1 else (1.0,)
    return _stage(width, encoder, decoder, window=1023, capacity=capacity, overflow="grow", grow_to=grow_to,
                  remat="dots", **fields)


def main_network(width: int, layers: str, **fields) -> StageConfig:
    return _stage(width, layers, "", remat="block", **fields)


def paper_run(*stages: StageConfig, peak_lr: float, tokens_per_chunk: tuple[float, ...], **fields) -> ConfigDict:
    """The recipe, in bfloat16, for a model of these stages."""
    return RunConfig(
        model=HNetConfig(stages=stages, dtype="bfloat16"),
        data=DataConfig(sequence_length=8192, batch_size=256),
        optimizer=OptimizerConfig(
            peak_lr=peak_lr, schedule="wsd_inverse_sqrt", warmup_steps=0, warmup_fraction=0.1, decay_fraction=0.2,
            stage_lr_rule="paper"),
        num_steps=220_000, tokens_per_chunk=tokens_per_chunk, log_every=50, eval_every=2000, eval_bytes=8_388_608,
        checkpoint_every=2000, **fields,
    ).to_config_dict()


def _stage(width: int, encoder: str, decoder: str, **fields) -> StageConfig:
    has_feed_forward = any(letter in "MT" for letter in encoder + decoder)
    return StageConfig(
        width=width, encoder=encoder, decoder=decoder, num_heads=NUM_HEADS,
        rotary_width=width // NUM_HEADS // 2,  # half of each head
        feed_forward_width=FEED_FORWARD_WIDTH[width] if has_feed_forward else 0, ssm_chunk_size=128, **fields)
