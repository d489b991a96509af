"""Losses of training: the surprise of the next token, and per stage the distance from its compression."""
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.config import RunConfig
from hnet import HNetLM, HNetOutput

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
COUNTS = ("/boundaries", "/overflow_boundaries", "/overflow_rows")  # metrics of a stage that are no averages


def target_mask(batch: Batch) -> jax.Array:
    """[b, t]: True where the next of t + 1 tokens is one of the same document, and one to be predicted."""
    segment_ids = batch["segment_ids"]
    mask = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    return mask & batch["loss_mask"][:, 1:] if "loss_mask" in batch else mask


def target_bytes(batch: Batch) -> jax.Array:
    """Counts the bytes of text that all tokens to predict stand for; float32."""
    num_bytes = batch["num_bytes"][:, 1:] if "num_bytes" in batch else 1
    return jnp.sum(target_mask(batch) * num_bytes, dtype=jnp.float32)


def read_bytes(batch: Batch) -> jax.Array:
    """Counts the bytes of text that the model reads, and BOS where tokens are bytes; float32."""
    num_bytes = batch["num_bytes"][:, :-1] if "num_bytes" in batch else 1
    return jnp.sum((batch["segment_ids"][:, :-1] != 0) * num_bytes, dtype=jnp.float32)


def next_token_nats(logits: jax.Array, batch: Batch) -> jax.Array:
    """Sums -log p over all tokens to predict, which are bytes for a model of bytes.

    `batch` holds t + 1 tokens a row for logits of the first t.
    """
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    return jnp.sum(jnp.where(target_mask(batch), nats, 0))


def apply_model(model: HNetLM, params: Any, batch: Batch) -> HNetOutput:
    levels = batch["boundary_levels"][:, :-1] if "boundary_levels" in batch else None
    return model.apply(
        {"params": params}, batch["tokens"][:, :-1], batch["segment_ids"][:, :-1], boundary_levels=levels)


def tokens_per_chunk(config: RunConfig, step: jax.Array) -> jax.Array:
    """Returns the compression that each ratio loss aims at in a step: [stages - 1] float32.

    From low to high compression, where a schedule is set: linear in the steps (after arXiv 2605.30080).
    """
    target = jnp.array(config.tokens_per_chunk, jnp.float32)
    if not config.tokens_per_chunk_start:
        return target
    start = jnp.array(config.tokens_per_chunk_start, jnp.float32)
    progress = jnp.minimum(step.astype(jnp.float32) / config.tokens_per_chunk_ramp_steps, 1)
    return start + (target - start) * progress


def loss_fn(
    params: Any, batch: Batch, num_targets: jax.Array, targets_per_stage: jax.Array, *,
    model: HNetLM, config: RunConfig, num_groups: int = 1, bytes_per_target: jax.Array | float = 1,
) -> tuple[jax.Array, Metrics]:
    """Cross entropy per target of the whole batch, plus the weighted ratio losses of this part of it.

    Args:
      num_targets: of the whole batch.
      targets_per_stage: `tokens_per_chunk` of this step.
      num_groups: of the rows, for the statistics of the ratio losses; see `layers.chunking.ratio_loss`.
      bytes_per_target: mean over the whole batch.
    """
    output = apply_model(model, params, batch)
    metrics = stage_metrics(output, read_bytes(batch))
    share = 1 / config.optimizer.accumulation_steps
    cross_entropy = next_token_nats(output.logits, batch) / jnp.maximum(num_targets, 1)
    loss = cross_entropy
    for index, stage in enumerate(output.stages.values()):
        target = targets_per_stage[index]
        ratio_loss = stage.ratio_loss(target, objective=config.ratio_objective, num_groups=num_groups)
        metrics |= {f"stage{index}/ratio_loss": ratio_loss, f"stage{index}/target_tokens_per_chunk": target}
        loss += config.ratio_loss_weight * share * ratio_loss
    # Of the parts of a batch, counts add up and all else is averaged.
    metrics = {name: value if name.endswith(COUNTS) else value * share for name, value in metrics.items()}
    bits_per_byte = cross_entropy / (bytes_per_target * math.log(2))
    return loss, metrics | {"train/loss_nats": loss, "train/bits_per_byte": bits_per_byte}


def stage_metrics(output: HNetOutput, num_bytes: jax.Array) -> Metrics:
    """Per stage: boundary statistics, and bytes per chunk of that stage, of the `num_bytes` that were read."""
    metrics = {}
    for name, stage in output.stages.items():
        of_stage = stage.metrics()
        num_chunks = of_stage["boundaries"] - of_stage["overflow_boundaries"]
        of_stage["bytes_per_chunk"] = num_bytes / jnp.maximum(num_chunks, 1)
        metrics |= {f"{name}/{key}": value for key, value in of_stage.items()}
    return metrics
