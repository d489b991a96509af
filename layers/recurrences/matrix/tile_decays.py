"""`Decays` of one head, for kernels: with two axes throughout, and masks that are computed where they are used."""
import jax
import jax.numpy as jnp

from layers.recurrences.matrix.decays import Decays, Matmul, exact_matmul, of_blocks, transposed


class TileDecays(Decays):
    """Made from log decays [c, k] of channels, or from a row of those of a head, [1, c].

    `parts` is a tuple: for channels as in `Decays`, the sizes of blocks one by one; of a head the decays between
    all readers and writers, [c, c], whose exponents are one matmul. That too adds up just the tokens between.
    """

    @classmethod
    def of(cls, log_decay: jax.Array, *, before: bool = False) -> "TileDecays":
        is_head = log_decay.shape[0] == 1
        size = log_decay.shape[1] if is_head else log_decay.shape[0]
        token, other = _numbers(size)
        to_reader = other < token if before else other <= token
        if is_head:
            def decay(which):
                return jnp.exp(jnp.sum(jnp.where(which, log_decay, 0), axis=1, keepdims=True))

            between = exact_matmul(jnp.where(to_reader, log_decay, 0), (token > other).astype(jnp.float32))
            parts = (jnp.where(other < token, jnp.exp(between), 0),)
        else:
            def decay(which):
                return jnp.exp(exact_matmul(which.astype(jnp.float32), log_decay))

            parts = tuple(decay(of_blocks(block, token, other, to_reader)[0]) for block in _sizes(size))
        whole = jnp.exp(jnp.sum(log_decay, axis=1 if is_head else 0, keepdims=True))
        return cls(decay(to_reader), decay(other > token), whole, parts)

    def pairs(
        self, reader: jax.Array, writer: jax.Array, *, own: bool = False, matmul: Matmul = exact_matmul
    ) -> jax.Array:
        size = reader.shape[0]
        token, other = _numbers(size)
        if self.to_end.shape[1] == 1:
            (left,) = self.parts
            left = jnp.where(token == other, 1, left) if own else left
            return matmul(reader, transposed(writer)) * left
        total = jnp.zeros((size, size), jnp.float32)
        if own:
            total = jnp.where(token == other, jnp.sum(reader * writer, axis=1, keepdims=True), total)
        for block, part in zip(_sizes(size), self.parts, strict=True):
            _, in_block = of_blocks(block, token, other, other <= token)
            total = total + jnp.where(in_block, matmul(part * reader, transposed(part * writer)), 0)
        return total


def _numbers(size: int) -> tuple[jax.Array, jax.Array]:
    """[size, size]: of the tokens along the first axis, and along the second."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def _sizes(size: int) -> list[int]:
    """1, 2, 4, ... of blocks, below that of a chunk."""
    return [1 << level for level in range((size - 1).bit_length())]
