"""Chunks out of tokens, and tokens out of chunks."""
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Shaped, typed
from layers.chunking.partition import Partition
from layers.chunking.smoothing import SmoothingImplementation, smooth


@typed
def chunk(x: Shaped[Array, "b t *d"], partition: Partition) -> Shaped[Array, "b c *d"]:
    """Takes the entry of each chunk's first token (section 2.2.1, downsampler); empty slots are 0."""
    index = partition.first_token.reshape(partition.first_token.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


@typed
def dechunk(
    z: Float[Array, "b c d"],
    boundary_prob: Float[Array, "b t"],
    partition: Partition,
    *,
    smoothing: bool = True,
    initial_value: Float[Array, "b d"] | None = None,
    round_to_bfloat16: bool = False,
    implementation: SmoothingImplementation = "auto",
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
    """Smooths the chunks by their confidence and hands each token the value of its chunk, in float32.

    Smoothing (eq. 5): s_c = p_c z_c + (1 - p_c) s_{c-1}, with p clamped to [1e-4, 1 - 1e-4] and s reset to 0 at
    each segment. Upsampling (eq. 8): token t receives s of the chunk it is in; 0 if it is in none.

    Args:
      smoothing: False leaves s_c = z_c.
      initial_value: s of the chunk that each row came in with, for partitions that continue a segment. None: 0.
      round_to_bfloat16: see `smooth`.
    Returns:
      The tokens' values, and s of the chunk that each row ends in; 0 where its last segment has none.
    """
    initial_value = jnp.zeros_like(z[:, 0], jnp.float32) if initial_value is None else initial_value
    smoothed = z.astype(jnp.float32)
    if smoothing:
        p = chunk(boundary_prob.astype(jnp.float32), partition)
        smoothed = smooth(z, p, partition.begins_segment, initial_value=initial_value,
                          round_to_bfloat16=round_to_bfloat16, implementation=implementation)
    upsampled = jnp.take_along_axis(smoothed, partition.slot[:, :, None], axis=1, mode="fill", fill_value=0)
    upsampled = jnp.where(partition.is_carried[:, :, None], initial_value[:, None], upsampled)
    values = jnp.concatenate([initial_value[:, None], smoothed], axis=1)
    last = jnp.take_along_axis(values, partition.last_place[:, None, None], axis=1, mode="fill", fill_value=0)
    return upsampled, last[:, 0]


@typed
def straight_through(p: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Returns exactly 1, with the gradient of `p` (eq. 7)."""
    return 1 + (p - jax.lax.stop_gradient(p))


@typed
def pack_rows(x: Shaped[Array, "b t *d"], num_buffers: int) -> Shaped[Array, "n l *d"]:
    """Puts rows one after the other into `num_buffers` buffers, to share slots; `reshape` is the way back.

    The chunks of a whole buffer vary less, relative to their number, than those of its worst row.
    """
    return x.reshape(num_buffers, -1, *x.shape[2:])
