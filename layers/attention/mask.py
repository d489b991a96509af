"""Masks: static values that say which pairs of tokens may attend, and compose with & and |.

  mask = Causal() & SameSegment() & (Window(64) | Bits())

A mask holds no arrays. Positions, segments and bits of the tokens travel beside it as `TokenInfo`, so that one
compiled program serves all of them. Padding, which is segment 0, sees nobody and is seen by nobody under any mask.
"No window" is the absence of `Window`.

A mask of your own is a frozen dataclass over `Mask` with one method, `allowed`; a second, `bounds`, lets
block-sparse attention skip the blocks in which it allows no pair:

  @dataclasses.dataclass(frozen=True)
  class Dilated(Mask):
      step: int

      def allowed(self, q, kv):
          return (q.position - kv.position) % self.step == 0
"""
import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.array_types import Array

if TYPE_CHECKING:
    from layers.attention.bounds import BlockBounds


class TokenInfo(NamedTuple):
    """Integers that a mask reads, one per token: [r, p, t], where r = b or 1, and p = 1 or n, of key heads.

    Attributes:
      position: place in the row, or whatever distances are measured in.
      segment: 0 is padding.
      bits: 32 flags per token; only `Bits` reads them.
    """

    position: Array
    segment: Array
    bits: Array | None = None


def token_info(
    length: int, *, positions: Array | None = None, segment_ids: Array | None = None, bits: Array | None = None
) -> TokenInfo:
    """Makes the TokenInfo of `length` tokens from arrays [b, t] (or [r, p, t]), and from defaults.

    Args:
      positions: None counts 0, 1, 2, ...
      segment_ids: None puts all tokens into one segment.
      bits: None leaves them out.
    """
    def with_heads(x: Array) -> Array:
        return x if x.ndim == 3 else x[:, None]

    # Defaults are numpy's: they stay known while a program is traced, so that lists of blocks can be exact.
    positions = np.arange(length, dtype=np.int32)[None] if positions is None else positions
    segment_ids = np.ones((1, length), np.int32) if segment_ids is None else segment_ids
    return TokenInfo(with_heads(positions), with_heads(segment_ids), None if bits is None else with_heads(bits))


class Mask:
    """A predicate on a query and a key."""

    # Whether all allowed pairs are of one segment; it saves a look at the segments of keys.
    keeps_segments = False

    def allowed(self, q: TokenInfo, kv: TokenInfo) -> jax.Array:
        """Tells whether a query may see a key; arrays broadcast. Padding is left to `may_attend`."""
        raise NotImplementedError(f"{type(self).__name__} must define allowed(q, kv)")

    def bounds(self, q: "BlockBounds", kv: "BlockBounds") -> tuple[jax.Array, jax.Array]:
        """Whether some query of a block may see some key of another, and whether all may see all.

        The first may be True where no pair is allowed, the second False where all are. Both may ignore padding.
        """
        shape = jnp.broadcast_shapes(q.has_padding.shape, kv.has_padding.shape)
        return jnp.ones(shape, bool), jnp.zeros(shape, bool)

    def leaves(self) -> tuple["Mask", ...]:
        """The masks that this one is made of."""
        return (self,)

    def __and__(self, other: "Mask") -> "Mask":
        return And(_members(self, And) + _members(other, And))

    def __or__(self, other: "Mask") -> "Mask":
        return Or(_members(self, Or) + _members(other, Or))


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Keys at the query's position or before it."""

    def allowed(self, q: TokenInfo, kv: TokenInfo) -> jax.Array:
        return q.position - kv.position >= 0

    def bounds(self, q: "BlockBounds", kv: "BlockBounds") -> tuple[jax.Array, jax.Array]:
        return q.last_position - kv.first_position >= 0, q.first_position - kv.last_position >= 0


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """Keys at most `size` positions from the query, on either side; with `Causal`, it and `size` before it."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"window {self.size} must be at least 0; leave Window out to see all distances")

    def allowed(self, q: TokenInfo, kv: TokenInfo) -> jax.Array:
        return self.allowed_before(q, kv) & (q.position - kv.position >= -self.size)

    def allowed_before(self, q: TokenInfo, kv: TokenInfo) -> jax.Array:
        """`allowed`, of keys that are not after the query."""
        return q.position - kv.position <= self.size

    def bounds(self, q: "BlockBounds", kv: "BlockBounds") -> tuple[jax.Array, jax.Array]:
        lowest, highest = q.first_position - kv.last_position, q.last_position - kv.first_position
        return ((lowest <= self.size) & (highest >= -self.size), (highest <= self.size) & (lowest >= -self.size))


@dataclasses.dataclass(frozen=True)
class SameSegment(Mask):
    """Keys of the query's own segment."""

    keeps_segments = True

    def allowed(self, q: TokenInfo, kv: TokenInfo) -> jax.Array:
        return q.segment == kv.segment

    def bounds(self, q: "BlockBounds", kv: "BlockBounds") -> tuple[jax.Array, jax.Array]:
        some = (q.first_segment <= kv.last_segment) & (kv.first_segment <= q.last_segment)
        one_each = (q.first_segment == q.last_segment) & (kv.first_segment == kv.last_segment)
        return some, some & one_each


@dataclasses.dataclass(frozen=True)
class Bits(Mask):
    """Keys that have a bit in common with the query: global tokens, sinks, edges of a graph."""

    def allowed(self, q: TokenInfo, kv: TokenInfo) -> jax.Array:
        return (q.bits & kv.bits) != 0

    def bounds(self, q: "BlockBounds", kv: "BlockBounds") -> tuple[jax.Array, jax.Array]:
        return (q.any_bits & kv.any_bits) != 0, (q.common_bits & kv.common_bits) != 0


@dataclasses.dataclass(frozen=True)
class _Joined(Mask):
    masks: tuple[Mask, ...]

    def leaves(self) -> tuple[Mask, ...]:
        return tuple(leaf for mask in self.masks for leaf in mask.leaves())


@dataclasses.dataclass(frozen=True)
class And(_Joined):
    """Keys that all of the masks allow; made by `&`."""

    @property
    def keeps_segments(self) -> bool:
        return any(mask.keeps_segments for mask in self.masks)

    def allowed(self, q: TokenInfo, kv: TokenInfo) -> jax.Array:
        is_causal = Causal() in self.masks  # a window then has one side only, which spares kernels a comparison
        return _reduce(jnp.logical_and, (
            mask.allowed_before(q, kv) if is_causal and isinstance(mask, Window) else mask.allowed(q, kv)
            for mask in self.masks))

    def bounds(self, q: "BlockBounds", kv: "BlockBounds") -> tuple[jax.Array, jax.Array]:
        some, everything = zip(*(mask.bounds(q, kv) for mask in self.masks), strict=True)
        return _reduce(jnp.logical_and, some), _reduce(jnp.logical_and, everything)


@dataclasses.dataclass(frozen=True)
class Or(_Joined):
    """Keys that any of the masks allows; made by `|`."""

    @property
    def keeps_segments(self) -> bool:
        return all(mask.keeps_segments for mask in self.masks)

    def allowed(self, q: TokenInfo, kv: TokenInfo) -> jax.Array:
        return _reduce(jnp.logical_or, (mask.allowed(q, kv) for mask in self.masks))

    def bounds(self, q: "BlockBounds", kv: "BlockBounds") -> tuple[jax.Array, jax.Array]:
        some, everything = zip(*(mask.bounds(q, kv) for mask in self.masks), strict=True)
        return _reduce(jnp.logical_or, some), _reduce(jnp.logical_or, everything)


CAUSAL, SAME_SEGMENT = Causal(), SameSegment()


def may_attend(mask: Mask, q: TokenInfo, kv: TokenInfo) -> jax.Array:
    """The predicate that every implementation evaluates: what the mask allows, without padding."""
    is_real = q.segment != 0
    if not mask.keeps_segments:
        is_real &= kv.segment != 0
    return mask.allowed(q, kv) & is_real


def pairs(mask: Mask, q: TokenInfo, kv: TokenInfo) -> jax.Array:
    """[r, p, t, s] bool: `may_attend` of all queries and all keys."""
    queries = jax.tree.map(lambda x: jnp.asarray(x)[:, :, :, None], q)
    keys = jax.tree.map(lambda x: jnp.asarray(x)[:, :, None, :], kv)
    return may_attend(mask, queries, keys)


def check_tokens(
    mask: Mask, name: str, tokens: TokenInfo, *, batch: int, num_key_heads: int, length: int
) -> None:
    """Raises ValueError for arrays of the wrong shape, and for bits that `mask` reads and that are not there."""
    for field, array in zip(tokens._fields, tokens, strict=True):
        if array is None:
            if any(isinstance(leaf, Bits) for leaf in mask.leaves()):
                raise ValueError(f"the mask has Bits, and {name}.bits is None; give a word of 32 bits per token")
        elif array.ndim != 3 or array.shape[0] not in (1, batch) or array.shape[1] not in (1, num_key_heads) or (
                array.shape[2] != length):
            raise ValueError(f"{name}.{field} has shape {list(array.shape)}; [{batch}, {num_key_heads}, {length}] "
                             "fits, or 1 in place of the first two")


def _members(mask: Mask, kind: type[_Joined]) -> tuple[Mask, ...]:
    return mask.masks if isinstance(mask, kind) else (mask,)


def _reduce(join, terms) -> jax.Array:
    first, *others = terms
    for term in others:
        first = join(first, term)
    return first
