"""Dynamic chunking in one call, for networks of any kind between tokens and chunks."""
import dataclasses
import math
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, Scalar, typed
from layers.chunking.gather import chunk, dechunk, straight_through
from layers.chunking.partition import Partition
from layers.chunking.ratio_loss import RatioObjective, ratio_loss
from layers.chunking.routers import NO_HINTS, CosineRouter, RouterHints
from layers.chunking.summary import PoolingScores, chunk_pooled

Downsampler = Literal["first", "mean", "mean_sqrt_length", "max", "last", "attention"]


class ChunkInfo(NamedTuple):
    """Beginnings of the chunks of a batch, for a network on the chunks and for the losses."""

    partition: Partition
    boundary_prob: jax.Array  # [b, t] float32; a chunk begins where it is above 1/2

    @property
    def segment_ids(self) -> jax.Array:
        """[b, c] int32, of the chunks; 0 = an empty slot."""
        return self.partition.chunk_segment_ids

    def ratio_loss(self, compression: Scalar, *, objective: RatioObjective = "hnet") -> jax.Array:
        """Pulls towards `compression` tokens per chunk; see `layers.chunking.ratio_loss`."""
        is_real = self.partition.segment_ids != 0
        return ratio_loss(self.boundary_prob, self.boundary_prob > 0.5, is_real, compression, objective=objective)


@partial(jax.tree_util.register_dataclass, data_fields=["info"], meta_fields=["smoothing"])
@dataclasses.dataclass(frozen=True)
class Unchunk:
    """The way back from chunks to tokens; a pytree, so that it may leave a compiled function."""

    info: ChunkInfo
    smoothing: bool

    def __call__(self, z: Float[Array, "b c d"]) -> Float[Array, "b t d"]:
        """Hands each token the value of its chunk, in float32, with the gradient that the router learns from."""
        partition, p = self.info
        values, _ = dechunk(z, p, partition, smoothing=self.smoothing)
        # The router's confidence in what it did; a boundary past the last slot was not made.
        confidence = jnp.where(partition.starts_chunk, p, 1 - p)
        return values * straight_through(confidence)[:, :, None]


class Chunker(nn.Module):
    """A router, and the chunks that it cuts: H-Net's dynamic chunking (arXiv 2507.07955) around any network.

    Example:
      >>> chunker = Chunker(slots_per_token=0.5)
      >>> x = jax.random.normal(jax.random.key(0), (2, 64, 32))
      >>> params = chunker.init(jax.random.key(1), x)
      >>> chunks, unchunk, info = chunker.apply(params, x)
      >>> z = jnp.tanh(chunks)  # a network of yours on chunks [b, c, d], whose segments are info.segment_ids
      >>> y = x + unchunk(z)
      >>> loss = jnp.mean(y**2) + 0.03 * info.ratio_loss(4.0)
      >>> chunks.shape, y.shape, bool(jnp.isfinite(loss))
      ((2, 32, 32), (2, 64, 32), True)

    Attributes:
      router: a module as `layers.chunking.routers` describes; None: `CosineRouter`, which is learned.
      slots_per_token: a row of t tokens has ceil(slots_per_token * t) slots; boundaries past them are demoted, and
        their tokens join the chunk before. 1 is always enough.
      downsampler: a chunk's vector: "first" of its own tokens, or a summary of the chunk *before*, which no token
        of a chunk can read the future from.
      smoothing: whether a chunk is averaged with those before it, by its confidence.
    """

    router: nn.Module | None = None
    slots_per_token: float = 1.0
    downsampler: Downsampler = "first"
    smoothing: bool = True

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"] | None = None, hints: RouterHints = NO_HINTS
    ) -> tuple[Float[Array, "b c d"], Unchunk, ChunkInfo]:
        """Returns one vector per chunk, the way back to tokens, and where the chunks begin.

        Raises:
          ValueError: slots_per_token is not above 0 and up to 1.
        """
        if not 0 < self.slots_per_token <= 1:
            raise ValueError(f"slots_per_token {self.slots_per_token} must be above 0 and up to 1")
        segment_ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        router = CosineRouter(name="router") if self.router is None else self.router
        p, _ = router(x, segment_ids, hints)
        num_slots = max(1, math.ceil(self.slots_per_token * x.shape[1]))
        partition = Partition.from_boundaries(p > 0.5, segment_ids, num_slots)
        info = ChunkInfo(partition, p)
        if self.downsampler == "first":
            chunks = chunk(x, partition)
        else:
            scores = PoolingScores(name="pooling")(x) if self.downsampler == "attention" else None
            chunks, _ = chunk_pooled(x, partition, self.downsampler, scores=scores)
        return chunks, Unchunk(info, self.smoothing), info
