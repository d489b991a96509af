"""The inverse of a unit lower triangle, which the delta rule and its kin need inside a chunk."""
from functools import partial

import jax
import jax.numpy as jnp

from layers.recurrences.matrix.decays import Matmul, exact_matmul


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit_lower_inverse(strictly_lower: jax.Array, exact: Matmul = exact_matmul) -> jax.Array:
    """Returns (1 + A)^-1 of a strictly lower triangular A [..., i, i], by blocks of doubled size.

    It multiplies off-diagonal blocks alone, no powers of A: those of similar keys grow without bound.
    """
    return _invert_by_doubling(strictly_lower, exact)


def _invert_by_doubling(strictly_lower: jax.Array, exact: Matmul) -> jax.Array:
    length = strictly_lower.shape[-1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    inverse = (i == j).astype(jnp.float32)
    size = 1
    while size < length:
        # Within blocks of twice the size, the part below the two whose inverses are there.
        below = (i & -2 * size == j & -2 * size) & (i & -size > j & -size)
        off_diagonal = jnp.where(below, strictly_lower, 0)
        if size > 1:
            off_diagonal = exact(exact(inverse, off_diagonal), inverse)
        inverse = inverse - off_diagonal
        size *= 2
    return jnp.broadcast_to(inverse, strictly_lower.shape)


def _unit_lower_inverse_fwd(strictly_lower, exact):
    inverse = _invert_by_doubling(strictly_lower, exact)
    return inverse, inverse


def _unit_lower_inverse_bwd(exact, inverse, gradient):
    # d (1 + A)^-1 = -(1 + A)^-1 dA (1 + A)^-1, of which A has the part below the diagonal.
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (-jnp.tril(exact(exact(transposed, gradient), transposed), -1),)


unit_lower_inverse.defvjp(_unit_lower_inverse_fwd, _unit_lower_inverse_bwd)
