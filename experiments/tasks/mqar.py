"""Multi-query associative recall (Arora et al., arXiv 2312.04927): pairs first, then their keys in another order.

A sequence begins with N pairs of a key and its value, all keys and all values distinct. N of the following pairs
of slots are drawn for the keys, nearer ones with more weight; the first slot of each holds its key, and the model
is asked there for the key's value. Nothing is asked elsewhere, and the value is not shown again.
"""
import dataclasses

import jax
import jax.numpy as jnp

from experiments.tasks.examples import Examples


@dataclasses.dataclass(frozen=True)
class MQAR:
    """Sequences of one length with one number of pairs.

    Token 0 is blank, keys are tokens 1 to vocab_size / 2 - 1, and values the tokens from vocab_size / 2 on.
    """

    vocab_size: int
    length: int
    num_pairs: int
    power: float = 0.01              # a in p(gap) ~ gap^(a - 1), with gaps counted from 1 in pairs of slots
    random_non_queries: bool = True  # empty slots get random tokens, drawn anew each time; False: token 0

    def __post_init__(self):
        if not 1 <= self.num_pairs <= self.length // 4:
            raise ValueError(
                f"{self.num_pairs} pairs do not fit into {self.length} tokens: pairs and queries take "
                f"{4 * max(self.num_pairs, 1)}; ask for 1 to {self.length // 4} pairs, or for more tokens")
        if self.vocab_size % 2 or self.num_pairs > self.vocab_size // 2 - 1:
            raise ValueError(
                f"vocab_size {self.vocab_size} must be even and at least {2 * (self.num_pairs + 1)}, for "
                f"{self.num_pairs} distinct keys and values")
        if not self.power > 0:
            raise ValueError(f"power {self.power} must be above 0")

    def sample(self, key: jax.Array) -> Examples:
        half, num_pairs = self.vocab_size // 2, self.num_pairs
        rng_keys, rng_values, rng_gaps, rng_fill = jax.random.split(key, 4)
        keys = 1 + _distinct(rng_keys, jnp.zeros(half - 1), num_pairs)
        values = half + _distinct(rng_values, jnp.zeros(half), num_pairs)
        num_slots = (self.length - 2 * num_pairs) // 2
        log_weight = (self.power - 1) * jnp.log(jnp.arange(1, num_slots + 1))
        positions = 2 * (num_pairs + _distinct(rng_gaps, log_weight, num_pairs))

        tokens = jnp.zeros(self.length, jnp.int32)
        if self.random_non_queries:
            tokens = jax.random.randint(rng_fill, (self.length,), 0, self.vocab_size)
        tokens = tokens.at[: 2 * num_pairs].set(jnp.stack([keys, values], axis=1).reshape(-1))
        return Examples(
            inputs=tokens.at[positions].set(keys), segment_ids=jnp.ones(self.length, jnp.int32), labels=values,
            positions=positions, windows=None)


def _distinct(key: jax.Array, log_weight: jax.Array, count: int) -> jax.Array:
    """Draws `count` distinct indices one after the other, each by the weights of those still left."""
    # The order of the largest sums of log-weight and Gumbel noise has that distribution.
    _, drawn = jax.lax.top_k(log_weight + jax.random.gumbel(key, log_weight.shape), count)
    return drawn
