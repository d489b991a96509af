"""The letters that name axes, and the array annotations built from them.

  b  sequences in the batch       t  positions at this stage (queries)
  d  model width                  s  key/value positions
  h  query or value heads         n  key heads, h a multiple of n; each serves r = h / n value heads
  k  width of a query/key head (the state size of a state space)           v  width of a value head
  c  chunk slots, c <= t; slots past the last chunk are padding
  e  segments (episodes) of a row  i, j  query and key blocks;  m  block lists;  l  entries of a list
  w  taps of a convolution

`segment_ids` [b, t] say which tokens belong together: 0 is padding, anywhere in a row; non-zero ids are
contiguous and unique within a row. Every op here takes them with this one meaning, and nothing
crosses from one segment into another. Their arithmetic is in `segments.py`.
"""
import functools
from collections.abc import Callable

import jax
import numpy as np
from beartype import beartype
from jaxtyping import Bool, Float, Inexact, Int, Integer, Shaped, jaxtyped

__all__ = ["Array", "Bool", "Float", "Inexact", "Int", "Integer", "Scalar", "Shaped", "typed"]

Array = jax.Array | np.ndarray
Scalar = int | float | np.number | Float[Array, ""] | Integer[Array, ""]  # a number, traced or not


def _beartype_when_called(function: Callable) -> Callable:
    """Returns beartype's check of a signature, built when first needed: 1 ms for each of a hundred functions."""
    @functools.cache
    def check() -> Callable:
        return beartype(function)

    @functools.wraps(function)
    def checked(*args, **kwargs):
        return check()(*args, **kwargs)

    return checked


# Checks shapes and dtypes while tracing, so a compiled step pays nothing. Not for pytree classes:
# tree.map, vmap and float0 cotangents rebuild those with leaves that are no arrays.
typed = jaxtyped(typechecker=_beartype_when_called)
