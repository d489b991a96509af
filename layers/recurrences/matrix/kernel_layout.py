"""The layout of kernels' arrays: for each head whole chunks of tokens, one after the other."""
from typing import Any

import jax
import jax.numpy as jnp

from layers.recurrences.matrix.step_inputs import StepInputs


def move_inputs_heads_first(inputs: StepInputs, chunk: int) -> StepInputs:
    """[b, t, n, r, width] -> [b, n, r, whole chunks, width]; log decays of heads [b, n, r, chunks, 1, chunk]."""
    arrays = jax.tree.map(lambda x: move_heads_first(x, chunk), inputs)
    if inputs.log_decay.shape[-1] == 1:
        # A last axis of 1 would take the memory of a whole row of registers.
        rows = arrays.log_decay.reshape(*arrays.log_decay.shape[:3], -1, 1, chunk)
        arrays = arrays._replace(log_decay=rows)
    return arrays


def move_heads_first(x: jax.Array, chunk: int) -> jax.Array:
    """[b, t, n, r, width] -> [b, n, r, whole chunks, width]; the zeros past the end are inert."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *((0, 0),) * 3))
    return jnp.moveaxis(x, 1, 3)


def move_tokens_first(x: jax.Array, length: int) -> jax.Array:
    return jnp.moveaxis(x, 3, 1)[:, :length]


def gradients_like(arrays: StepInputs, num_repeats: int) -> StepInputs:
    """Shapes of the gradients of a kernel's inputs: one per value head, float32 where shared ones are summed."""
    def gradient_like(x):
        is_shared = x.shape[2] < num_repeats
        return like(x, (*x.shape[:2], num_repeats, *x.shape[3:]), jnp.float32 if is_shared else x.dtype)

    return jax.tree.map(gradient_like, arrays)


def sum_shared(gradients: StepInputs, inputs: StepInputs) -> StepInputs:
    """Sums gradients over the value heads that share an input; returns them as [b, t, n, r, width]."""
    def sum_one(gradient, x):
        if gradient.ndim == 6:
            gradient = gradient.reshape(*gradient.shape[:3], -1, 1)
        if x.shape[3] < gradient.shape[2]:
            gradient = jnp.sum(gradient, axis=2, keepdims=True)
        return move_tokens_first(gradient, x.shape[1])[..., : x.shape[4]].astype(x.dtype)

    return jax.tree.map(sum_one, gradients, inputs)


def like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape of a kernel's output, which inside `jax.shard_map` differs between devices as x does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
