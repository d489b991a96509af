"""Which blocks of keys each block of queries reads: compact lists, per batch row and head, that may be traced."""
import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from layers.array_types import Array, Bool, Float, typed
from layers.attention.mask_spec import MaskSpec, block_bounds, some_and_all, token_rows


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["counts", "ids", "overflow"], meta_fields=["block_q", "block_k", "num_key_blocks"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockLists:
    """For each of i query blocks, the distinct key blocks that it reads.

    Lists belong to one of b batch rows, or 1 for all of them, and to one of m heads: 1 for all, one per key head,
    or one per query head. Values may be traced: a program compiled for one list runs any other of its shape.

    Attributes:
      counts: [b, m, i] int32, how many entries of a list count.
      ids: [b, m, i, l] int32, key blocks; those past the count are ignored.
      overflow: [b, m, i] int32, blocks that were asked for and are not in the list.
      block_q, block_k: tokens in a block of queries, of keys; the last of each may be shorter.
      num_key_blocks: blocks of keys there are.
    """

    counts: jax.Array
    ids: jax.Array
    overflow: jax.Array
    block_q: int
    block_k: int
    num_key_blocks: int

    @classmethod
    def from_ids(
        cls, counts: jax.Array, ids: jax.Array, *, block_q: int, block_k: int, num_key_blocks: int
    ) -> "BlockLists":
        """Lists made elsewhere. Entries that name no block are left out and counted in `overflow`.

        Raises:
          ValueError: the values are known now (not traced) and an entry names no block, a block is named twice, or
            a count is not between 0 and the length of a list.
        """
        counts, ids = jnp.asarray(counts, jnp.int32), jnp.asarray(ids, jnp.int32)
        if counts.shape != ids.shape[:-1] or ids.ndim != 4:
            raise ValueError(
                f"counts {list(counts.shape)} and ids {list(ids.shape)} must be [b, m, i] and [b, m, i, l]")
        lists = cls(counts=counts, ids=ids, overflow=jnp.zeros_like(counts),
                    block_q=block_q, block_k=block_k, num_key_blocks=num_key_blocks)
        lists.check()
        return lists.without_bad_entries()

    @classmethod
    @typed
    def from_block_mask(
        cls, mask: Bool[Array, "b m i j"], *, block_q: int, block_k: int, max_blocks: int | None = None
    ) -> "BlockLists":
        """Lists of the blocks where `mask` is True, lowest first.

        Args:
          max_blocks: length of a list; later blocks are cut off and counted in `overflow`. None: room for all.
        """
        num_key_blocks = mask.shape[-1]
        wanted = jnp.sum(mask, axis=-1, dtype=jnp.int32)
        length = num_key_blocks if max_blocks is None else min(max_blocks, num_key_blocks)
        ids = jnp.argsort(~mask, axis=-1, stable=True)[..., :length].astype(jnp.int32)
        counts = jnp.minimum(wanted, length)
        return cls(counts=counts, ids=ids, overflow=wanted - counts,
                   block_q=block_q, block_k=block_k, num_key_blocks=num_key_blocks)

    @classmethod
    @typed
    def from_top_k(
        cls, scores: Float[Array, "b m i j"], k: int, *, block_q: int, block_k: int, causal: bool = True
    ) -> "BlockLists":
        """Lists of the k highest scores of each query block; of equal scores, the lower block wins.

        Args:
          scores: -inf is never chosen, however few others there are.
          causal: key blocks that begin after the last query of a block are not chosen either; queries and keys are
            counted from the same token.
        """
        if k < 1:
            raise ValueError(f"k {k} must be at least 1")
        num_queries, num_keys = scores.shape[2:]
        if causal:
            last_query = (jnp.arange(num_queries) + 1) * block_q - 1
            scores = jnp.where(jnp.arange(num_keys) * block_k <= last_query[:, None], scores, -jnp.inf)
        best, ids = jax.lax.top_k(scores, min(k, num_keys))
        ids = jnp.sort(jnp.where(best == -jnp.inf, num_keys, ids), axis=-1)
        counts = jnp.sum(ids < num_keys, axis=-1, dtype=jnp.int32)
        return cls(counts=counts, ids=jnp.minimum(ids, num_keys - 1).astype(jnp.int32),
                   overflow=jnp.zeros_like(counts), block_q=block_q, block_k=block_k, num_key_blocks=num_keys)

    @classmethod
    def from_mask_spec(
        cls, spec: MaskSpec, num_queries: int, num_keys: int, *, block_q: int, block_k: int,
        max_blocks: int | None = None,
    ) -> "BlockLists":
        """Lists of the blocks in which `spec` lets some query see some key, as far as bounds of their tokens tell.

        Where the mask is known before the program runs (causal and window, no arrays), a list is as long as the
        longest one needs; else it has room for all blocks, or for `max_blocks`.
        """
        with jax.ensure_compile_time_eval() if spec.is_static() else contextlib.nullcontext():
            rows = token_rows(spec, num_queries, num_keys)
            queries = jax.tree.map(lambda x: x[:, :, None], block_bounds(rows.of_queries, block_q))
            keys = jax.tree.map(lambda x: x[:, None, :], block_bounds(rows.of_keys, block_k))
            some, _ = some_and_all(spec, queries, keys)
            if spec.is_static() and max_blocks is None:
                max_blocks = max(1, int(np.asarray(some).sum(axis=-1).max(initial=0)))
        return cls.from_block_mask(some[:, None], block_q=block_q, block_k=block_k, max_blocks=max_blocks)

    @property
    def num_query_blocks(self) -> int:
        return self.ids.shape[2]

    def is_live(self) -> jax.Array:
        """[b, m, i, l] bool: the entries that count."""
        return jnp.arange(self.ids.shape[-1]) < self.counts[..., None]

    def to_dense(self) -> jax.Array:
        """[b, m, i, j] bool: whether the block of keys j is in the list of the block of queries i."""
        dense = jnp.zeros((*self.counts.shape, self.num_key_blocks), bool)
        ids = jnp.where(self.is_live(), self.ids, self.num_key_blocks)
        return jnp.put_along_axis(dense, ids, True, axis=-1, inplace=False, mode="drop")

    def transpose(self) -> "BlockLists":
        """For each block of keys, the blocks of queries that read it; block sizes change places."""
        mask = self.to_dense().swapaxes(-1, -2)
        return BlockLists.from_block_mask(mask, block_q=self.block_k, block_k=self.block_q)

    def intersect(self, other: "BlockLists") -> "BlockLists":
        """The blocks that are in both. Lists of one row or head go with lists of several."""
        mine = (self.block_q, self.block_k, self.num_query_blocks, self.num_key_blocks)
        theirs = (other.block_q, other.block_k, other.num_query_blocks, other.num_key_blocks)
        if mine != theirs:
            raise ValueError(
                f"lists of other blocks: block_q, block_k, query blocks and key blocks are {mine} and {theirs}")
        mask = self.to_dense() & other.to_dense()
        length = min(self.ids.shape[-1], other.ids.shape[-1])
        lists = BlockLists.from_block_mask(mask, block_q=self.block_q, block_k=self.block_k, max_blocks=length)
        return dataclasses.replace(lists, overflow=self.overflow + other.overflow)

    def problem(self) -> str | None:
        """What is wrong with the values, which must be concrete: a count, a block that is none, a repeated one."""
        counts, ids = np.asarray(self.counts), np.asarray(self.ids)
        if counts.size and not 0 <= counts.min() <= counts.max() <= ids.shape[-1]:
            return f"counts range over {counts.min()} .. {counts.max()}; lists have room for 0 .. {ids.shape[-1]}"
        live = np.arange(ids.shape[-1]) < counts[..., None]
        bad = live & ((ids < 0) | (ids >= self.num_key_blocks))
        if bad.any():
            return (f"{bad.sum()} entries name no block, the first is {ids[bad][0]}; "
                    f"there are blocks 0 .. {self.num_key_blocks - 1}")
        unlike = np.sort(np.where(live, ids, -1 - np.arange(ids.shape[-1])), axis=-1)
        if (unlike[..., 1:] == unlike[..., :-1]).any():
            return "a list names a block twice"
        return None

    def check(self) -> None:
        """Raises ValueError if the values are known now and wrong; traced ones are left to `debug=True`."""
        if not any(isinstance(array, jax.core.Tracer) for array in (self.counts, self.ids)):
            problem = self.problem()
            if problem is not None:
                raise ValueError(f"BlockLists: {problem}")

    def without_bad_entries(self) -> "BlockLists":
        """Moves entries that name no block, and counts past the end, to `overflow`."""
        is_good = self.is_live() & (self.ids >= 0) & (self.ids < self.num_key_blocks)
        counts = jnp.sum(is_good, axis=-1, dtype=jnp.int32)
        ids = jnp.sort(jnp.where(is_good, self.ids, self.num_key_blocks), axis=-1)
        ids = jnp.minimum(ids, self.num_key_blocks - 1)
        missing = jnp.maximum(self.counts, 0) - counts
        return dataclasses.replace(self, counts=counts, ids=ids, overflow=self.overflow + missing)
