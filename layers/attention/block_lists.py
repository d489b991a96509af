"""Lists of the key blocks that each query block reads, per batch row and head; their values may be traced."""
import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from layers.array_types import Array, Bool, Float, Int, typed
from layers.arrays.choose import choose
from layers.attention.bounds import block_bounds, some_and_all
from layers.attention.mask import Mask, TokenInfo

BITS_PER_WORD = 32  # key blocks per word of `BlockLists.rows`


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["counts", "ids", "overflow", "rows"], meta_fields=["block_q", "block_k", "num_key_blocks"],
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
      rows: [b, m, w, t] int32, for each query a bit per key block that it may read of those in its list, 32 to a
        word, from `pack_query_bits`; 1 fits in place of b and m. None: each query reads all of its list.
      block_q, block_k: tokens in a block of queries, of keys; the last of each may be shorter.
      num_key_blocks: how many blocks the keys make.
    """

    counts: jax.Array
    ids: jax.Array
    overflow: jax.Array
    rows: jax.Array | None = None
    block_q: int
    block_k: int
    num_key_blocks: int

    @classmethod
    def from_ids(
        cls, counts: jax.Array, ids: jax.Array, *, block_q: int, block_k: int, num_key_blocks: int
    ) -> "BlockLists":
        """Takes lists made elsewhere. Entries that name no block are left out and counted in `overflow`.

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
        """Lists the blocks where `mask` is True, lowest first.

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
        """Lists the k highest scores of each query block; of equal scores, the lower block wins.

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
        choice = choose(scores, top_k=k)
        return cls(counts=choice.counts, ids=jnp.minimum(choice.ids, num_keys - 1).astype(jnp.int32),
                   overflow=jnp.zeros_like(choice.counts),
                   block_q=block_q, block_k=block_k, num_key_blocks=num_keys)

    @classmethod
    @typed
    def from_query_mask(cls, mask: Bool[Array, "b m t j"], *, block_q: int, block_k: int) -> "BlockLists":
        """Lists the blocks that some query of a block chose; each query reads those that it chose itself."""
        padded = jnp.pad(mask, ((0, 0), (0, 0), (0, -mask.shape[2] % block_q), (0, 0)))
        by_block = jnp.any(padded.reshape(*mask.shape[:2], -1, block_q, mask.shape[3]), axis=3)
        lists = cls.from_block_mask(by_block, block_q=block_q, block_k=block_k)
        return dataclasses.replace(lists, rows=pack_query_bits(mask))

    @classmethod
    def from_mask(
        cls, mask: Mask, q_tokens: TokenInfo, kv_tokens: TokenInfo | None = None, *, block_q: int, block_k: int,
        max_blocks: int | None = None,
    ) -> "BlockLists":
        """Lists the blocks in which `mask` lets some query see some key, as far as bounds of their tokens tell.

        Where the tokens are known before the program runs, which is so for numpy arrays and thus for defaults of
        `token_info`, lists are as long as the longest one needs; otherwise they have room for all blocks, or for
        `max_blocks`.

        Args:
          kv_tokens: None means those of the queries.
        """
        kv_tokens = q_tokens if kv_tokens is None else kv_tokens
        is_known = all(isinstance(array, np.ndarray) for array in jax.tree.leaves((q_tokens, kv_tokens)))
        with jax.ensure_compile_time_eval() if is_known else contextlib.nullcontext():
            queries = jax.tree.map(lambda x: x[..., :, None], block_bounds(q_tokens, block_q))
            keys = jax.tree.map(lambda x: x[..., None, :], block_bounds(kv_tokens, block_k))
            some, _ = some_and_all(mask, queries, keys)
            if is_known and max_blocks is None:
                max_blocks = max(1, int(np.asarray(some).sum(axis=-1).max(initial=0)))
            return cls.from_block_mask(some, block_q=block_q, block_k=block_k, max_blocks=max_blocks)

    @property
    def num_query_blocks(self) -> int:
        return self.ids.shape[2]

    def is_live(self) -> jax.Array:
        """Tells the entries that count, [b, m, i, l] bool."""
        return jnp.arange(self.ids.shape[-1]) < self.counts[..., None]

    def to_dense(self) -> jax.Array:
        """Tells whether block j of the keys is in the list of block i of the queries, [b, m, i, j] bool."""
        dense = jnp.zeros((*self.counts.shape, self.num_key_blocks), bool)
        ids = jnp.where(self.is_live(), self.ids, self.num_key_blocks)
        return jnp.put_along_axis(dense, ids, True, axis=-1, inplace=False, mode="drop")

    def transpose(self) -> "BlockLists":
        """Lists for each block of keys the blocks of queries that read it; block sizes change places.

        Raises:
          ValueError: queries choose for themselves (`rows`), which the transposed lists cannot say.
        """
        if self.rows is not None:
            raise ValueError("lists with rows, a choice of each query, have no transpose")
        mask = self.to_dense().swapaxes(-1, -2)
        return BlockLists.from_block_mask(mask, block_q=self.block_k, block_k=self.block_q)

    def intersect(self, other: "BlockLists") -> "BlockLists":
        """Lists the blocks that are in both. Lists of one row or head go with lists of several."""
        mine = (self.block_q, self.block_k, self.num_query_blocks, self.num_key_blocks)
        theirs = (other.block_q, other.block_k, other.num_query_blocks, other.num_key_blocks)
        if mine != theirs:
            raise ValueError(
                f"lists of different blocks: block_q, block_k, query and key blocks are {mine} and {theirs}")
        mask = self.to_dense() & other.to_dense()
        length = min(self.ids.shape[-1], other.ids.shape[-1])
        lists = BlockLists.from_block_mask(mask, block_q=self.block_q, block_k=self.block_k, max_blocks=length)
        chosen = [each.rows for each in (self, other) if each.rows is not None]
        rows = chosen[0] & chosen[-1] if chosen else None
        return dataclasses.replace(lists, overflow=self.overflow + other.overflow, rows=rows)

    def problem(self) -> str | None:
        """Says which of the values, which must be concrete, is wrong: a count, a block, or one listed twice."""
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

    def check(self, *, when_run: bool = False) -> None:
        """Raises ValueError if the values are known now and wrong.

        Args:
          when_run: check traced values too, on the host each time that the program runs; for debugging.
        """
        if not any(isinstance(array, jax.core.Tracer) for array in (self.counts, self.ids)):
            _fail_if_wrong(self)
        elif when_run:
            jax.debug.callback(_fail_if_wrong, self)

    def without_bad_entries(self) -> "BlockLists":
        """Moves entries that name no block, and counts past the end, to `overflow`."""
        is_good = self.is_live() & (self.ids >= 0) & (self.ids < self.num_key_blocks)
        counts = jnp.sum(is_good, axis=-1, dtype=jnp.int32)
        ids = jnp.sort(jnp.where(is_good, self.ids, self.num_key_blocks), axis=-1)
        ids = jnp.minimum(ids, self.num_key_blocks - 1)
        missing = jnp.maximum(self.counts, 0) - counts
        return dataclasses.replace(self, counts=counts, ids=ids, overflow=self.overflow + missing)


@typed
def pack_query_bits(selected: Bool[Array, "b m t j"]) -> Int[Array, "b m w t"]:
    """Packs, for each query, which of the j key blocks it reads, into words of 32 bits: `BlockLists.rows`."""
    num_words = -(-selected.shape[-1] // BITS_PER_WORD)
    padding = num_words * BITS_PER_WORD - selected.shape[-1]
    bits = jnp.pad(selected, ((0, 0), (0, 0), (0, 0), (0, padding)))
    bits = bits.reshape(*bits.shape[:-1], num_words, BITS_PER_WORD).astype(jnp.uint32)
    words = jnp.sum(bits << jnp.arange(BITS_PER_WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32).swapaxes(-1, -2)


def is_selected(words: jax.Array, block: jax.Array) -> jax.Array:
    """Reads bit `block` mod 32 of each word, as bool; the words are those that hold the block."""
    return ((words >> (block & (BITS_PER_WORD - 1))) & 1) == 1


def _fail_if_wrong(blocks: BlockLists) -> None:
    problem = blocks.problem()
    if problem is not None:
        raise ValueError(f"BlockLists: {problem}")
