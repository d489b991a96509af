"""AdamW with a schedule, a learning rate per stage, and a choice of which parameters decay."""
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.config import OptimizerConfig

PyTree = Any


def make_optimizer(config: OptimizerConfig, num_steps: int, params: PyTree) -> optax.GradientTransformation:
    """Builds the update rule for parameters shaped like `params` (arrays or ShapeDtypeStructs)."""
    multipliers = lr_multipliers(config, params)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(config, params)),
        # After the decay, as in the release: a stage's multiplier scales its decay too.
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, multipliers)),
        optax.scale_by_learning_rate(learning_rate(config, num_steps)),
    )


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Maps a step to its learning rate: linear warm-up to peak_lr, then one of the two schedules.

    "wsd" stays at the peak and falls over the last `decay_fraction` of the steps as 1 - sqrt(progress)
    (arXiv 2405.18392); "cosine" falls all the way. Both reach final_lr_fraction * peak_lr at the last step,
    which is number num_steps - 1 here.
    """
    peak, floor = config.peak_lr, config.peak_lr * config.final_lr_fraction
    if config.schedule == "cosine":
        decay_steps, shape = num_steps - config.warmup_steps, lambda u: (1 + jnp.cos(jnp.pi * u)) / 2
    else:
        decay_steps, shape = round(num_steps * config.decay_fraction), lambda u: 1 - jnp.sqrt(u)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)
        progress = jnp.clip((step - (num_steps - 1 - decay_steps)) / max(decay_steps, 1), 0, 1)
        return warmup * (floor + (peak - floor) * shape(progress))

    return schedule


def lr_multipliers(config: OptimizerConfig, params: PyTree) -> PyTree:
    """One factor per parameter: that of the stage it belongs to; embedding and head go with stage 0."""
    if not config.stage_lr_multipliers:
        return jax.tree.map(lambda _: 1.0, params)

    def multiplier(path, _):
        stages = re.findall(r"\['stage(\d+)'\]", jax.tree_util.keystr(path))
        return config.stage_lr_multipliers[int(stages[-1]) if stages else 0]

    return jax.tree_util.tree_map_with_path(multiplier, params)


def decay_mask(config: OptimizerConfig, params: PyTree) -> PyTree:
    """True where weight decay applies.

    "kernels": matrices and convolution taps, never norms, biases, time constants or embeddings. "official":
    what the release's parameter groups do, which is everything but biases and Mamba-2's gated norm.
    """
    def decays(path, _):
        leaf = path[-1].key
        if config.decay_groups == "official":
            return leaf not in ("bias", "norm_scale")
        return leaf in ("kernel", "lm_head")

    return jax.tree_util.tree_map_with_path(decays, params)
