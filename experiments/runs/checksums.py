"""Fingerprints of arrays, computed where the arrays are, that do not depend on how they are laid out."""
from typing import Any

import jax
import jax.numpy as jnp


def array_checksums(tree: Any) -> dict[str, list[int]]:
    """Returns two 32-bit sums for each array, by path; the same on any mesh, integer sums having no order."""
    sums = jax.device_get(_checksums(leaves_by_path(tree)))
    return {path: [int(plain), int(weighted)] for path, (plain, weighted) in sums.items()}


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf}, with paths such as "params/stage0/kernel"."""
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths_and_leaves}


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    # One program for all arrays. With one for each, all of them are in flight at once, each with a sum over the
    # mesh, and the few threads of a CPU wait for one another in different programs for ever.
    return {path: _checksum(array) for path, array in arrays.items()}


def _checksum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums the bit patterns of `x`, plainly and weighted by place, modulo 2^32.

    The weights 2i + 1 tell a moved value; being odd, they let no single flipped bit vanish.
    """
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # Row-major place of each word, built axis by axis: a flat arange would gather a sharded array.
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, length in enumerate(words.shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    # An explicit dtype: jnp.sum would widen to uint64 under jax_enable_x64.
    plain = jnp.sum(words, dtype=jnp.uint32)
    weighted = jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
    return plain, weighted
