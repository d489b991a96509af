"""Tokens as kernels read them: for each head one after the other, whole chunks of them, and back."""
from typing import Any

import jax
import jax.numpy as jnp

from layers.recurrences.matrix.tokens import Tokens


def by_heads(tokens: Tokens, chunk: int) -> Tokens:
    """[b, t, g, r, width] -> [b, g, r, whole chunks, width]; log decays of heads [b, g, r, chunks, 1, chunk]."""
    arrays = jax.tree.map(lambda x: head_first(x, chunk), tokens)
    if tokens.log_decay.shape[-1] == 1:
        # A last axis of 1 would take the memory of a whole row of registers.
        rows = arrays.log_decay.reshape(*arrays.log_decay.shape[:3], -1, 1, chunk)
        arrays = arrays._replace(log_decay=rows)
    return arrays


def head_first(x: jax.Array, chunk: int) -> jax.Array:
    """Zeros past the end are inert."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *((0, 0),) * 3))
    return jnp.moveaxis(x, 1, 3)


def token_first(x: jax.Array, length: int) -> jax.Array:
    return jnp.moveaxis(x, 3, 1)[:, :length]


def gradients_of(arrays: Tokens, num_heads: int) -> Tokens:
    """What a kernel returns for what it read: gradients for each head, float32 where heads share and add them."""
    def of(x):
        is_shared = x.shape[2] < num_heads
        return like(x, (*x.shape[:2], num_heads, *x.shape[3:]), jnp.float32 if is_shared else x.dtype)

    return jax.tree.map(of, arrays)


def summed(gradients: Tokens, tokens: Tokens) -> Tokens:
    """`gradients_of` as those of tokens [b, t, g, r, width]."""
    def of(gradient, x):
        if gradient.ndim == 6:
            gradient = gradient.reshape(*gradient.shape[:3], -1, 1)
        if x.shape[3] < gradient.shape[2]:
            gradient = jnp.sum(gradient, axis=2, keepdims=True)
        return token_first(gradient, x.shape[1])[..., : x.shape[4]].astype(x.dtype)

    return jax.tree.map(of, gradients, tokens)


def like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """What a kernel returns; inside `jax.shard_map`, it differs between devices as x does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
