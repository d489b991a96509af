"""AdamW with a schedule, a learning rate per stage, and a choice of which parameters decay."""
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.config import OptimizerConfig, RunConfig

PyTree = Any
Path = tuple[Any, ...]  # keys of a pytree, outermost first
BYTES_PER_TOKEN = 4.6  # of the GPT-2 tokenizer, whose models' learning rates eq. 11 starts from


def stage_of_path(path: Path) -> int | None:
    """Returns the stage that a parameter of an `HNetLM` belongs to; embedding and head go with stage 0.

    A `boundary_lm` is frozen, and so belongs to none.
    """
    if path[0].key == "boundary_lm":
        return None
    stages = re.findall(r"\['stage(\d+)'\]", jax.tree_util.keystr(path))
    return int(stages[-1]) if stages else 0


def make_optimizer(
    config: OptimizerConfig,
    num_steps: int,
    params: PyTree,
    *,
    stage_of: Callable[[Path], int | None] = stage_of_path,
    multipliers: Sequence[float] = (1.0,),
) -> optax.GradientTransformation:
    """Builds the update rule of a training of `num_steps` steps.

    Args:
      params: arrays or ShapeDtypeStructs, shaped like the parameters.
      stage_of: maps the path of a parameter to the index of its multiplier, or to None if it is frozen.
      multipliers: factors on the learning rate.
    """
    factors = lr_multipliers(multipliers, params, stage_of)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(config, params)),
        # After the decay, as in the release: a stage's multiplier scales its decay too.
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)),
        optax.scale_by_learning_rate(learning_rate(config, num_steps)),
    )


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Maps a step to its learning rate: linear warm-up to peak_lr, then down to r = final_lr_fraction of it.

    With u the progress of the decay, from 0 to 1, the rate as a fraction of the peak is

      wsd               r + (1 - r) (1 - sqrt(u)), over the last `decay_fraction` of the steps (arXiv 2405.18392)
      wsd_inverse_sqrt  1 / sqrt(1 + u (r^-2 - 1)), over the same; r > 0
      cosine            r + (1 - r) (1 + cos(pi u)) / 2, over all steps after the warm-up

    r is reached at the last step, which is number num_steps - 1 here. H-Net warmed up for 10 % and decayed as an
    inverse square root for 20 % of the steps; the normalisation, which meets both ends, is ours.
    """
    r = config.final_lr_fraction
    warmup_steps = config.warmup_steps or round(config.warmup_fraction * num_steps)
    decay_steps = round(num_steps * config.decay_fraction)
    if config.schedule == "cosine":
        decay_steps = num_steps - warmup_steps
    fraction = {
        "wsd": lambda u: r + (1 - r) * (1 - jnp.sqrt(u)),
        "wsd_inverse_sqrt": lambda u: 1 / jnp.sqrt(1 + u * (r**-2 - 1)),
        "cosine": lambda u: r + (1 - r) * (1 + jnp.cos(jnp.pi * u)) / 2,
    }[config.schedule]

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)
        progress = jnp.clip((step - (num_steps - 1 - decay_steps)) / max(decay_steps, 1), 0, 1)
        return config.peak_lr * warmup * fraction(progress)

    return schedule


def stage_multipliers(config: RunConfig) -> tuple[float, ...]:
    """Returns one factor on the learning rate per stage, outermost first: as configured, or by the rule.

    "paper" is H-Net (arXiv 2507.07955) eq. 11: with D_s the width of stage s of 0 .. S and N_s its tokens per
    chunk, N_S = 1, lambda_s = sqrt(4.6 * prod_{i >= s} N_i / prod_i N_i * D_S / D_s).
    """
    num_stages = len(config.model.stages)
    if config.optimizer.stage_lr_multipliers:
        return config.optimizer.stage_lr_multipliers
    if config.optimizer.stage_lr_rule == "equal":
        return (1.0,) * num_stages
    widths = [stage.stack.width for stage in config.model.stages]
    bytes_per_token = [math.prod(config.tokens_per_chunk[:stage]) for stage in range(num_stages)]
    return tuple(math.sqrt(BYTES_PER_TOKEN / each * widths[-1] / width)
                 for each, width in zip(bytes_per_token, widths, strict=True))


def lr_multipliers(
    multipliers: Sequence[float], params: PyTree, stage_of: Callable[[Path], int | None] = stage_of_path
) -> PyTree:
    """Returns one factor per parameter: that of its stage, or 0 if it is frozen, on its decay as well.

    The gradients of a frozen parameter are 0, so that they add nothing to the norm that is clipped.
    """
    def multiplier(path, _):
        stage = stage_of(path)
        if stage is not None and stage >= len(multipliers):
            raise ValueError(f"multipliers {tuple(multipliers)} has {len(multipliers)} values, and none for stage "
                             f"{stage}, which {jax.tree_util.keystr(path)} belongs to")
        return 0.0 if stage is None else multipliers[stage]

    return jax.tree_util.tree_map_with_path(multiplier, params)


def decay_mask(config: OptimizerConfig, params: PyTree) -> PyTree:
    """Returns True for parameters that weight decay applies to.

    "kernels": matrices and convolution taps, never norms, biases, time constants or embeddings. "official":
    the release's parameter groups, which decay everything but biases and Mamba-2's gated norm.
    """
    def decays(path, _):
        leaf = path[-1].key
        if config.decay_groups == "official":
            return leaf not in ("bias", "norm_scale")
        return leaf in ("kernel", "lm_head")

    return jax.tree_util.tree_map_with_path(decays, params)
