"""The choices of one stage's router, for losses, metrics and analysis."""
import jax
import jax.numpy as jnp
from flax import struct

from layers import ratio_loss
from layers.array_types import Scalar
from layers.chunking.ratio_loss import RatioObjective


@struct.dataclass
class StageOutput:
    """The router's choices at a stage's own length t; b counts rows, or buffers inside a packed stage.

    Attributes:
      boundary_prob: [b, t] float32; 1 at the first token of a segment, 0 at padding.
      boundary_mask: [b, t] bool: every boundary, those past the last slot too.
      is_real: [b, t] bool: False = padding.
      num_overflow: [b] int32: boundaries past the last slot, whose tokens joined the chunk before.
      num_slots: int32: chunk slots per row, or per buffer of a packed stage.
    """

    boundary_prob: jax.Array
    boundary_mask: jax.Array
    is_real: jax.Array
    num_overflow: jax.Array
    num_slots: jax.Array

    @classmethod
    def of_chunks(
        cls, boundary_prob: jax.Array, segment_ids: jax.Array, starts_chunk: jax.Array, num_slots: jax.Array
    ) -> "StageOutput":
        """Returns the choices of a stage that gave the tokens in `starts_chunk` [b, t] a slot."""
        # Strictly greater: an all-zero sequence has p = 0.5 everywhere and would split at every byte.
        boundary_mask = boundary_prob > 0.5
        num_overflow = jnp.sum(boundary_mask & ~starts_chunk, axis=1, dtype=jnp.int32)
        return cls(boundary_prob, boundary_mask, segment_ids != 0, num_overflow, num_slots)

    @classmethod
    def of_padding(cls, batch: int) -> "StageOutput":
        """Returns the choices of a stage that has read one padding token per row: none."""
        no, none = jnp.zeros((batch, 1), bool), jnp.zeros(batch, jnp.int32)
        return cls(jnp.zeros((batch, 1), jnp.float32), no, no, none, jnp.int32(1))

    def padded_to(self, length: int) -> "StageOutput":
        """Appends padding tokens, up to t = `length`."""
        def pad(x):
            return jnp.pad(x, ((0, 0), (0, length - x.shape[1])))

        return self.replace(boundary_prob=pad(self.boundary_prob), boundary_mask=pad(self.boundary_mask),
                            is_real=pad(self.is_real))

    def ratio_loss(
        self, compression: Scalar, *, objective: RatioObjective = "hnet", num_groups: int = 1
    ) -> jax.Array:
        """Pulls towards `compression` tokens per chunk, over real tokens; see `layers.chunking.ratio_loss`."""
        return ratio_loss(self.boundary_prob, self.boundary_mask, self.is_real, compression,
                          objective=objective, num_groups=num_groups)

    def metrics(self) -> dict[str, jax.Array]:
        """Counts boundaries among the batch's real tokens (F) and averages their probability (G)."""
        count = jnp.maximum(jnp.sum(self.is_real, dtype=jnp.float32), 1)
        num_boundaries = jnp.sum(self.boundary_mask, dtype=jnp.float32)
        return {
            "boundaries": num_boundaries,
            "boundary_rate": num_boundaries / count,
            "mean_boundary_prob": jnp.sum(self.boundary_prob) / count,
            "capacity": self.num_slots.astype(jnp.float32),
            "overflow_boundaries": jnp.sum(self.num_overflow, dtype=jnp.float32),
            "overflow_rows": jnp.sum(self.num_overflow > 0, dtype=jnp.float32),
        }
