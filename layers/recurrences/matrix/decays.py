"""Decays within a chunk: the share of what a token wrote that is left for a later token to read.

It is exp of the sum of the log decays between the two. Two things must not happen. A difference of running sums
loses small decays behind a large one; so every sum here adds up just its own tokens. And exp(-sum), by which the
sum between two tokens is often split in two, overflows; so it is split at a token between them, where both parts
are <= 0. For two neighbouring blocks of s tokens, the first of which writes and the second reads, that token is at
their border; and among the blocks of 1, 2, 4, ... tokens, every two tokens are in two neighbours once:

  s = 1      s = 2      s = 4           a row reads, a column writes
  . . . .    . . . .    . . . . . .
  x . . .    . . . .    . . . . . .
  . . . .    x x . .    . . . . . .
  . . x .    x x . .    . . . . . .
                        x x x x . .
                        x x x x . .
"""
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Matmul = Callable[[jax.Array, jax.Array], jax.Array]
exact_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # in float32
# As a device does by default: an accelerator rounds both, to bfloat16 or TF32, and adds in float32.
rounded_matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)


class Decays(NamedTuple):
    """Decays of a chunk of c tokens, for s block sizes 1, 2, 4, ...; the last axis is 1 (heads) or k."""

    from_start: jax.Array  # [..., c, 1 or k]: at a token, of the state that entered the chunk
    to_end: jax.Array      # [..., c, 1 or k]: at the end of the chunk, of what a token wrote
    whole: jax.Array       # [..., 1, 1 or k]: over the chunk
    parts: jax.Array       # [..., s, c, 1 or k]: from a writer to the border, or from the border to a reader

    @classmethod
    def from_log_decay(cls, log_decay: jax.Array, exact: Matmul, *, before: bool = False) -> "Decays":
        """Makes the decays from log decays [..., c, 1 or k] <= 0.

        Args:
          before: readers read before their own decay.
        """
        size, width = log_decay.shape[-2:]
        exponents = exact(_masks(size, before).sums, log_decay)
        decays = jnp.exp(exponents.reshape(*log_decay.shape[:-2], -1, size, width))
        whole = jnp.exp(jnp.sum(log_decay, axis=-2, keepdims=True))
        return cls(decays[..., 0, :, :], decays[..., 1, :, :], whole, decays[..., 2:, :, :])

    def pairs(self, reader: jax.Array, writer: jax.Array, matmul: Matmul, *, own: bool = False) -> jax.Array:
        """Returns [..., i, j]: reader_i . writer_j [..., c, k], each product decayed from j to i; 0 unless j < i.

        Args:
          own: also j = i, undecayed.
        """
        size = reader.shape[-2]
        itself, in_block = np.eye(size, dtype=np.float32) * own, _masks(size).pairs
        if self.to_end.shape[-1] == 1:
            left = jnp.sum(jnp.where(in_block, self.parts * transposed(self.parts), 0), axis=-3)
            return matmul(reader, transposed(writer)) * (left + itself)
        reader_parts, writer_parts = (self.parts * x[..., None, :, :] for x in (reader, writer))
        blocks = matmul(reader_parts, transposed(writer_parts))
        itself = itself * jnp.sum(reader * writer, axis=-1, keepdims=True)
        return jnp.sum(jnp.where(in_block, blocks, 0), axis=-3) + itself

    def query(self, reader: jax.Array, state: jax.Array, matmul: Matmul) -> jax.Array:
        """Reads the state [..., k, v] that entered the chunk with readers [..., c, k]: [..., c, v]."""
        if self.from_start.shape[-1] == 1:
            return self.from_start * matmul(reader, state)
        return matmul(self.from_start * reader, state)

    def decay_state(self, state: jax.Array) -> jax.Array:
        """Decays the state [..., k, v] over the whole chunk."""
        return transposed(self.whole) * state

    def accumulate(self, key: jax.Array, value: jax.Array, matmul: Matmul) -> jax.Array:
        """Sums keys [..., c, k] times values [..., c, v], decayed to the end of the chunk: [..., k, v]."""
        if self.to_end.shape[-1] == 1:
            return matmul(transposed(key), self.to_end * value)
        return matmul(transposed(self.to_end * key), value)


class ChunkMasks(NamedTuple):
    """Masks of a chunk's blocks, for the sums and the pairs of `Decays`."""

    sums: np.ndarray   # [(2 + s) * c, c] of 0 and 1: which tokens' log decays each of `Decays` adds up
    pairs: np.ndarray  # [s, c, c]: for each size, which readers and writers its blocks have


@lru_cache
def _masks(size: int, before: bool = False) -> ChunkMasks:
    token, other = np.ogrid[:size, :size]
    to_reader = other < token if before else other <= token
    sums, pairs = [to_reader, other > token], []
    block = 1
    while block < size:
        for masks, mask in zip((sums, pairs), block_masks(block, token, other, to_reader), strict=True):
            masks.append(mask)
        block *= 2
    return ChunkMasks(np.concatenate(sums).astype(np.float32), np.array(pairs, bool).reshape(-1, size, size))


def block_masks(block: int, token, other, to_reader):
    """Returns, for blocks of `block` tokens, whose log decays a token adds up, and which pairs read and write.

    Args:
      token, other: numbers of tokens, along the first and along the second axis; a power of two in a block.
      to_reader: which of all tokens before it decay what a token reads.
    """
    border = (token & -2 * block) + block
    reads = token >= border
    sums = (reads & (other >= border) & to_reader) | (~reads & (other > token) & (other < border))
    return sums, reads & (other < border) & (other >= border - block)


def transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)
