"""`Decays` of one head, for kernels: two axes throughout, and masks computed where they are used."""
import jax
import jax.numpy as jnp

from layers.recurrences.matrix.decays import Decays, Matmul, block_masks, transposed


class TileDecays(Decays):
    """Decays of log decays [c, k] of channels, or of a head in a row, [1, c].

    `parts` is a tuple: for channels as in `Decays`, one block size after the other; for a head the decays between
    all readers and writers, [c, c], whose exponents are one matmul. That too adds up just the tokens between.
    """

    @classmethod
    def from_log_decay(cls, log_decay: jax.Array, exact: Matmul, *, before: bool = False) -> "TileDecays":
        is_head = log_decay.shape[0] == 1
        size = log_decay.shape[1] if is_head else log_decay.shape[0]
        token, other = _token_numbers(size)
        to_reader = other < token if before else other <= token
        if is_head:
            def decay(mask):
                return jnp.exp(jnp.sum(jnp.where(mask, log_decay, 0), axis=1, keepdims=True))

            between = exact(jnp.where(to_reader, log_decay, 0), (token > other).astype(jnp.float32))
            parts = (jnp.where(other < token, jnp.exp(between), 0),)
        else:
            def decay(mask):
                return jnp.exp(exact(mask.astype(jnp.float32), log_decay))

            parts = tuple(decay(block_masks(block, token, other, to_reader)[0]) for block in _block_sizes(size))
        whole = jnp.exp(jnp.sum(log_decay, axis=1 if is_head else 0, keepdims=True))
        return cls(decay(to_reader), decay(other > token), whole, parts)

    def pairs(self, reader: jax.Array, writer: jax.Array, matmul: Matmul, *, own: bool = False) -> jax.Array:
        size = reader.shape[0]
        token, other = _token_numbers(size)
        if self.to_end.shape[1] == 1:
            (left,) = self.parts
            left = jnp.where(token == other, 1, left) if own else left
            return matmul(reader, transposed(writer)) * left
        total = jnp.zeros((size, size), jnp.float32)
        if own:
            total = jnp.where(token == other, jnp.sum(reader * writer, axis=1, keepdims=True), total)
        for block, part in zip(_block_sizes(size), self.parts, strict=True):
            _, in_block = block_masks(block, token, other, other <= token)
            total = total + jnp.where(in_block, matmul(part * reader, transposed(part * writer)), 0)
        return total


def _token_numbers(size: int) -> tuple[jax.Array, jax.Array]:
    """Numbers the tokens along the first and along the second axis of [size, size]."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def _block_sizes(size: int) -> list[int]:
    """1, 2, 4, ... below the size of a chunk."""
    return [1 << level for level in range((size - 1).bit_length())]
