"""Routers by name. A router of your own: a module as `layers.chunking.routers` describes, and a line here."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from hnet.config import ChunkingConfig
from layers import CosineRouter, GivenRouter, SpaceRouter, StrideRouter, last_real, segment_starts


class EntropyRouter(GivenRouter):
    """A router that cuts at bytes that a language model found hard to foresee (BLT, arXiv 2412.09871).

    That model, `HNetConfig.boundary_lm`, reads the bytes before any stage does: `HNetLM` runs it, turns its logits
    into boundary levels by `entropy_boundaries`, and hands those over as hints. Here they are only read.
    """


_MAKE = {
    "learned": lambda chunking, name: CosineRouter(name=name),
    "stride": lambda chunking, name: StrideRouter(chunking.router_stride, name=name),
    "space": lambda chunking, name: SpaceRouter(name=name),
    "entropy": lambda chunking, name: EntropyRouter(name=name),
    "given": lambda chunking, name: GivenRouter(name=name),
}


def make_router(chunking: ChunkingConfig, name: str | None = None) -> nn.Module:
    """Makes the router that `chunking` names."""
    return _MAKE[chunking.router](chunking, name)


def entropy_boundaries(
    logits: jax.Array, segment_ids: jax.Array, threshold: float, last_entropy: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Starts chunks at bytes that a language model found hard to foresee (BLT, arXiv 2412.09871, section 2.3).

    Args:
      logits: [b, t, vocab], of the byte after each; no gradient passes.
      threshold: nats; a byte starts a chunk if the entropy of its prediction is above.
      last_entropy: [b], of the prediction of the first real byte of each row, from the call before; else None.
    Returns:
      Boundary levels [b, t] int32, 1 or 0; and the entropy [b] of the byte after the last real one.
    """
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(logits).astype(jnp.float32), axis=-1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)  # [b, t]
    before = jnp.pad(entropy[:, :-1], ((0, 0), (1, 0)))
    is_real = segment_ids != 0
    last = entropy[:, -1]
    if last_entropy is not None:
        before = jnp.where(segment_starts(segment_ids), last_entropy[:, None], before)
        last = jnp.where(jnp.any(is_real, axis=1), last_real(entropy, segment_ids), last_entropy)
    return ((before > threshold) & is_real).astype(jnp.int32), last
