"""Draws the next token from its logits."""
import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature and filters for drawing a token; each filter applies to the tokens that the one before kept.

    Attributes:
      temperature: divides the logits; 0 always takes the most probable token.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest tokens whose probabilities sum to at least p.
      min_p: drop tokens whose probability is below this fraction of the most probable one's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"{self}: temperature and top_k must be >= 0, top_p in (0, 1], min_p in [0, 1]")


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token per row, int32 [b], from logits [b, vocab] with one key per row [b]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)  # most probable first, so each filter cuts off a tail
    rank = jnp.arange(logits.shape[-1])
    if sampling.top_k:
        ranked = jnp.where(rank < sampling.top_k, ranked, -jnp.inf)
    if sampling.top_p < 1:
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    if sampling.min_p:
        ranked = jnp.where(ranked >= ranked[:, :1] + jnp.log(sampling.min_p), ranked, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
