"""One step of training as a pure function, and the state it advances."""
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from experiments.config import RunConfig
from experiments.errors import UsageError
from experiments.mesh import batch_sharding, parameter_shardings, replicated
from experiments.optimizer import learning_rate, make_optimizer
from hnet import HNetLM, HNetOutput, parameter_shapes

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    step: jax.Array  # int32: steps taken, which is also the position in the data
    params: Any
    opt_state: Any


def target_mask(segment_ids: jax.Array) -> jax.Array:
    """[b, t + 1] -> [b, t]: True where the next token is a byte of the same document."""
    return (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)


def next_byte_nats(logits: jax.Array, batch: Batch) -> jax.Array:
    """The sum of -log p over all next bytes; `batch` holds t + 1 tokens a row for logits of the first t."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    return jnp.sum(jnp.where(target_mask(batch["segment_ids"]), nats, 0))


def apply_model(model: HNetLM, params: Any, batch: Batch) -> HNetOutput:
    return model.apply({"params": params}, batch["tokens"][:, :-1], batch["segment_ids"][:, :-1])


def loss_fn(params: Any, batch: Batch, num_targets: jax.Array, *, model: HNetLM, config: RunConfig):
    """Cross entropy per target byte of the whole batch, plus the weighted ratio losses of this part of it."""
    output = apply_model(model, params, batch)
    ratio_losses = {
        f"{name}/ratio_loss": stage.ratio_loss(target)
        for (name, stage), target in zip(output.stages.items(), config.tokens_per_chunk, strict=True)
    }
    share = 1 / config.optimizer.accumulation_steps
    cross_entropy = next_byte_nats(output.logits, batch) / jnp.maximum(num_targets, 1)
    loss = cross_entropy + config.ratio_loss_weight * share * sum(ratio_losses.values())
    metrics = {"train/loss_nats": loss, "train/bits_per_byte": cross_entropy / math.log(2)}
    averaged = ratio_losses | stage_metrics(output)
    return loss, metrics | jax.tree.map(lambda value: value * share, averaged)


def stage_metrics(output: HNetOutput) -> Metrics:
    """Per stage: boundary statistics, and bytes per chunk of that stage."""
    metrics = {}
    for name, stage in output.stages.items():
        of_stage = stage.metrics()
        num_bytes = jnp.sum(output.stages["stage0"].mask, dtype=jnp.float32)
        num_chunks = jnp.sum(stage.boundary_mask, dtype=jnp.float32) - of_stage["overflow_boundaries"]
        of_stage["bytes_per_chunk"] = num_bytes / jnp.maximum(num_chunks, 1)
        metrics |= {f"{name}/{key}": value for key, value in of_stage.items()}
    return metrics


def train_step(
    state: TrainState, batch: Batch, *, model: HNetLM, config: RunConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """Differentiates the batch, in parts if so configured, and updates the parameters once."""
    num_targets = jnp.sum(target_mask(batch["segment_ids"]), dtype=jnp.float32)
    differentiate = jax.grad(partial(loss_fn, model=model, config=config), has_aux=True)
    num_parts = config.optimizer.accumulation_steps
    if num_parts == 1:
        grads, metrics = differentiate(state.params, batch, num_targets)
    else:
        # Row i goes to part i mod num_parts, so that every part is spread over all devices.
        parts = jax.tree.map(lambda z: jnp.swapaxes(z.reshape(-1, num_parts, *z.shape[1:]), 0, 1), batch)

        def add_part(total, part):
            return jax.tree.map(jnp.add, total, differentiate(state.params, part, num_targets)), None

        shapes = jax.eval_shape(differentiate, state.params, jax.tree.map(lambda z: z[0], parts), num_targets)
        zeros = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), shapes)
        (grads, metrics), _ = jax.lax.scan(add_part, zeros, parts)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
        "train/grad_norm": optax.tree.norm(grads),
        "train/param_norm": optax.tree.norm(params),
        "train/learning_rate": learning_rate(config.optimizer, config.num_steps)(state.step),
        "train/target_bytes": num_targets,
    }
    return TrainState(state.step + 1, params, opt_state), metrics


class Program(NamedTuple):
    """The compiled functions of one run on one mesh. Call them inside `use_mesh(mesh)`."""

    model: HNetLM
    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]  # donates the state it is given
    abstract_state: TrainState  # shapes, dtypes and shardings


def compile_program(config: RunConfig, mesh: Mesh) -> Program:
    """Prepares `init` and `step` with a sharding for every array; they compile at their first call.

    Raises:
      UsageError: the batch does not divide over the mesh.
    """
    rows = config.data.batch_size // config.optimizer.accumulation_steps
    if rows % mesh.shape["data"]:
        raise UsageError(
            f"config.data.batch_size {config.data.batch_size} in {config.optimizer.accumulation_steps} parts does "
            f"not divide over {mesh.shape['data']} devices; change config.data.batch_size or config.model_axis")
    model = HNetLM(config.model)
    params = parameter_shapes(config.model)
    optimizer = make_optimizer(config.optimizer, config.num_steps, params)

    def init(key: jax.Array) -> TrainState:
        params = nn.unbox(_init_boxed(model, key))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    key = jax.eval_shape(jax.random.key, 0)  # abstract: the mesh may be of devices that are not here
    shapes = jax.eval_shape(init, key)
    boxed = jax.eval_shape(partial(_init_boxed, model), key)
    of_params = parameter_shardings(boxed, params, mesh)
    def is_moment(node: Any) -> bool:
        return jax.tree.structure(node) == jax.tree.structure(params)

    of_optimizer = jax.tree.map(
        lambda node: of_params if is_moment(node) else replicated(mesh), shapes.opt_state, is_leaf=is_moment)
    shardings = TrainState(replicated(mesh), of_params, of_optimizer)
    step = partial(train_step, model=model, config=config, optimizer=optimizer)
    return Program(
        model=model,
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0),
        abstract_state=jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
            shapes, shardings),
    )


def _init_boxed(model: HNetLM, key: jax.Array) -> Any:
    return model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]  # they do not depend on the length
