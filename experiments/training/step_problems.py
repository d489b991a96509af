"""Detects metrics that must stop training."""
import math

from experiments.config import RunConfig


def step_problem(config: RunConfig, values: dict[str, float]) -> str:
    """Says what is wrong with a step of training and which fields to change; "" if nothing is."""
    # Overflow first: where it is an error, the model has made the loss NaN.
    return overflow_problem(config, values) or _not_finite(values)


def _not_finite(values: dict[str, float]) -> str:
    """Says which number of a step is not finite and what to do about it; "" if all are."""
    # The loss is that of the parameters before the step; what a checkpoint saves is what came out of it.
    for name in ("train/loss_nats", "train/grad_norm", "train/param_norm"):
        if not math.isfinite(values[name]):
            return f"{name} is {values[name]}; lower config.optimizer.peak_lr or config.optimizer.max_grad_norm"
    return ""


def overflow_problem(config: RunConfig, values: dict[str, float]) -> str:
    """Says which stage had too many boundaries past its capacity in a step, and what to do; "" if none had."""
    stages = config.model.stages
    for index, stage in enumerate(stages[:-1]):
        name = f"stage{index}"
        count, total = values[f"{name}/overflow_boundaries"], values[f"{name}/boundaries"]
        is_error = stage.chunking.overflow == "error"
        if count <= (0 if is_error else config.max_overflow_fraction * total):
            continue
        field = f"config.model.stages.{name}.chunking"
        others = "'grow'" if stage.chunking.packed else "'grow' or 'merge'"
        return (
            f"{count:,.0f} of the {total:,.0f} boundaries of {name} are past its capacity of "
            f"{values[f'{name}/capacity']:,.0f} slots per {'buffer' if stage.chunking.packed else 'row'}, in "
            f"{values[f'{name}/overflow_rows']:,.0f} rows; raise {field}.capacity {stage.chunking.capacity}, or "
            + (f"set {field}.overflow 'error' to {others}" if is_error else
               f"set {field}.overflow to 'grow', or raise config.max_overflow_fraction "
               f"{config.max_overflow_fraction}"))
    return ""
