"""What the router of one stage did: for the losses, the metrics and whoever wants to look."""
import jax
import jax.numpy as jnp
from flax import struct

from layers import ratio_loss
from layers.array_types import Scalar
from layers.chunking.ratio_loss import RatioObjective


@struct.dataclass
class StageOutput:
    """The router's choices at a stage's own length t; b counts rows, or buffers inside a packed stage."""

    boundary_prob: jax.Array   # [b, t] float32; 1 at the first token of a segment, 0 at padding
    boundary_mask: jax.Array   # [b, t] bool: every boundary, those past the capacity too
    mask: jax.Array            # [b, t] bool: True = a real token
    num_overflow: jax.Array    # [b] int32: boundaries past the capacity, whose tokens joined the chunk before
    capacity: jax.Array        # int32: chunk slots per row, or per buffer of a packed stage

    @classmethod
    def of_padding(cls, batch: int) -> "StageOutput":
        """What a stage does with one padding token per row: nothing."""
        no, none = jnp.zeros((batch, 1), bool), jnp.zeros(batch, jnp.int32)
        return cls(jnp.zeros((batch, 1), jnp.float32), no, no, none, jnp.int32(1))

    def padded_to(self, length: int) -> "StageOutput":
        """The same with padding tokens behind, t = `length`."""
        def pad(x):
            return jnp.pad(x, ((0, 0), (0, length - x.shape[1])))

        return self.replace(
            boundary_prob=pad(self.boundary_prob), boundary_mask=pad(self.boundary_mask), mask=pad(self.mask))

    def ratio_loss(
        self, target: Scalar, *, objective: RatioObjective = "hnet", num_groups: int = 1
    ) -> jax.Array:
        """Eq. 10 over the batch's real tokens, for `target` tokens per chunk; see `layers.chunking.ratio_loss`."""
        return ratio_loss(self.boundary_prob, self.boundary_mask, self.mask, target,
                          objective=objective, num_groups=num_groups)

    def metrics(self) -> dict[str, jax.Array]:
        """Scalars over the batch's real tokens: how many became boundaries (F), and with what confidence (G)."""
        count = jnp.maximum(jnp.sum(self.mask, dtype=jnp.float32), 1)
        num_boundaries = jnp.sum(self.boundary_mask, dtype=jnp.float32)
        return {
            "boundaries": num_boundaries,
            "boundary_rate": num_boundaries / count,
            "mean_boundary_prob": jnp.sum(self.boundary_prob) / count,
            "capacity": self.capacity.astype(jnp.float32),
            "overflow_boundaries": jnp.sum(self.num_overflow, dtype=jnp.float32),
            "overflow_rows": jnp.sum(self.num_overflow > 0, dtype=jnp.float32),
        }
