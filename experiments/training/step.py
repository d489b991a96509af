"""One step of training as a pure function, and the state it advances."""
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
from experiments.training.losses import Batch, Metrics, loss_fn, target_bytes, target_mask, tokens_per_chunk
from experiments.training.mesh import batch_sharding, parameter_shardings, replicated
from experiments.training.optimizer import learning_rate, make_optimizer, stage_multipliers
from hnet import HNetLM, parameter_shapes


@struct.dataclass
class TrainState:
    step: jax.Array  # int32: steps taken, which is also the position in the data
    params: Any
    opt_state: Any
    ema: Any = ()    # an average over the steps of params; () without optimizer.ema_decay


def weights(state: TrainState) -> Any:
    """The parameters to look at a model with: their average, where there is one."""
    return state.ema or state.params


def train_step(
    state: TrainState, batch: Batch, *, model: HNetLM, config: RunConfig,
    optimizer: optax.GradientTransformation, num_shards: int = 1,
) -> tuple[TrainState, Metrics]:
    """Differentiates the batch, in parts if so configured, and updates the parameters once.

    Args:
      num_shards: of the batch, each of which has a ratio loss of its own where config.ratio_statistics is
        "local"; with parts, each shard of each part has.
    """
    num_targets = jnp.sum(target_mask(batch), dtype=jnp.float32)
    num_bytes = target_bytes(batch)
    targets_per_stage = tokens_per_chunk(config, state.step)
    loss = partial(
        loss_fn, model=model, config=config, num_groups=num_shards if config.ratio_statistics == "local" else 1,
        bytes_per_target=num_bytes / jnp.maximum(num_targets, 1) if "num_bytes" in batch else 1)
    differentiate = jax.grad(loss, has_aux=True)
    num_parts = config.optimizer.accumulation_steps
    if num_parts == 1:
        grads, metrics = differentiate(state.params, batch, num_targets, targets_per_stage)
    else:
        # Row i goes to part i mod num_parts, so that every part is spread over all devices.
        parts = jax.tree.map(lambda z: jnp.swapaxes(z.reshape(-1, num_parts, *z.shape[1:]), 0, 1), batch)

        def of_part(part):
            return differentiate(state.params, part, num_targets, targets_per_stage)

        def add_part(total, part):
            return jax.tree.map(jnp.add, total, of_part(part)), None

        shapes = jax.eval_shape(of_part, jax.tree.map(lambda z: z[0], parts))
        zeros = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), shapes)
        (grads, metrics), _ = jax.lax.scan(add_part, zeros, parts)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
        "train/grad_norm": optax.tree.norm(grads),
        "train/param_norm": optax.tree.norm(params),
        "train/learning_rate": learning_rate(config.optimizer, config.num_steps)(state.step),
        "train/target_bytes": num_bytes,
    }
    ema = update_ema(state.ema, params, config.optimizer.ema_decay)
    return TrainState(state.step + 1, params, opt_state, ema), metrics


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """decay * ema + (1 - decay) * params. It began as the initial parameters, whose share fades with the rest."""
    # In this form an average of what does not change is exactly that. Without an average, ema is ().
    return jax.tree.map(lambda average, new: average + (1 - decay) * (new - average), ema, params) if ema else ()


class Program(NamedTuple):
    """The compiled functions of one run on one mesh. Call them inside `use_mesh(mesh)`."""

    model: HNetLM
    init: Callable[[jax.Array], TrainState]  # from a key
    start: Callable[[Any], TrainState]       # from parameters
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]  # donates the state it is given
    abstract_state: TrainState  # shapes, dtypes and shardings


def compile_program(config: RunConfig, mesh: Mesh) -> Program:
    """Prepares the functions, with a sharding for every array; they compile at their first call.

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
    optimizer = make_optimizer(
        config.optimizer, config.num_steps, params, multipliers=stage_multipliers(config))

    def start(params: Any) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else ()
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

    def init(key: jax.Array) -> TrainState:
        return start(nn.unbox(_init_boxed(model, key)))

    key = jax.eval_shape(jax.random.key, 0)  # abstract: the mesh may be of devices that are not here
    shapes = jax.eval_shape(init, key)
    boxed = jax.eval_shape(partial(_init_boxed, model), key)
    of_params = parameter_shardings(boxed, params, mesh)
    def is_moment(node: Any) -> bool:
        return jax.tree.structure(node) == jax.tree.structure(params)

    of_optimizer = jax.tree.map(
        lambda node: of_params if is_moment(node) else replicated(mesh), shapes.opt_state, is_leaf=is_moment)
    shardings = TrainState(replicated(mesh), of_params, of_optimizer, of_params if shapes.ema else ())
    step = partial(train_step, model=model, config=config, optimizer=optimizer, num_shards=mesh.shape["data"])
    return Program(
        model=model,
        init=jax.jit(init, out_shardings=shardings),
        start=jax.jit(start, in_shardings=(of_params,), out_shardings=shardings),
        step=jax.jit(
            step, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0),
        abstract_state=jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
            shapes, shardings),
    )


def _init_boxed(model: HNetLM, key: jax.Array) -> Any:
    return model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]  # they do not depend on the length
