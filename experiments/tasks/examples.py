"""Examples of synthetic tasks: sequences, the steps at which the model is asked, and the answers."""
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

# Folded into the key of a seed first, so that no split and no model draws from the key of another.
SPLITS = {"train": 0, "validation": 1, "test": 2, "init": 3}


class Examples(NamedTuple):
    """Sequences with questions; a `Source` samples a single one, without the axis b."""

    inputs: jax.Array             # [b, t] tokens, or [b, t, v] vectors
    segment_ids: jax.Array        # [b, t] int32, 0 = padding
    labels: jax.Array             # [b, n] int32, the answers; -1 = not a question
    positions: jax.Array | None   # [b, n] int32, the steps at which they are asked; None: at every step, n = t
    windows: jax.Array | None     # [b, n] int32 below n, questions that share one answer; None: each has its own


class Source(Protocol):
    """A distribution of examples; `sample` is a pure function of the key, vmapped and compiled by its caller."""

    @property
    def length(self) -> int: ...  # steps of every example, padding included

    def sample(self, key: jax.Array) -> Examples: ...


def split_key(seed: int | jax.Array, split: str, source: int | jax.Array = 0) -> jax.Array:
    """Returns the key of a split, different from that of every other split of the seed.

    Args:
      source: index that distinguishes sources drawn from side by side, such as the columns of a table.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), SPLITS[split]), source)


def sample_batch(
    sources: Sequence[Source], chosen: int | jax.Array, key: jax.Array, index: int | jax.Array, batch_size: int
) -> Examples:
    """Draws batch number `index` of a split from the chosen one of several sources of equal length.

    The batch depends on the arguments alone, not on earlier draws.

    Args:
      key: from `split_key`.
    """
    keys = jax.random.split(jax.random.fold_in(key, index), batch_size)
    num_questions = max(jax.eval_shape(source.sample, key).labels.shape[0] for source in sources)

    def draw(source: Source, keys: jax.Array) -> Examples:
        batch = jax.vmap(source.sample)(keys)
        extra = ((0, 0), (0, num_questions - batch.labels.shape[1]))
        return batch._replace(
            labels=jnp.pad(batch.labels, extra, constant_values=-1),
            positions=None if batch.positions is None else jnp.pad(batch.positions, extra))

    return jax.lax.switch(chosen, [partial(draw, source) for source in sources], keys)


def answer_nats(logits: jax.Array, examples: Examples) -> jax.Array:
    """Returns the mean of -log p of the answers; logits are [b, n, v] float32."""
    is_asked = examples.labels >= 0
    log_p = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_p, jnp.where(is_asked, examples.labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(is_asked, nats, 0)) / jnp.maximum(jnp.sum(is_asked), 1)


def count_right(logits: jax.Array, examples: Examples) -> tuple[jax.Array, jax.Array]:
    """Counts the right answers and the questions, both float32.

    Questions that share a window are answered together, by the sum of their probabilities.
    """
    labels = examples.labels
    is_asked = labels >= 0
    if examples.windows is not None:
        rows = jnp.arange(labels.shape[0])[:, None]
        p = jnp.where(is_asked[..., None], jax.nn.softmax(logits), 0)
        logits = jnp.zeros_like(logits).at[rows, examples.windows].add(p)
        labels = jnp.full_like(labels, -1).at[rows, examples.windows].max(labels)
        is_asked = labels >= 0
    is_right = is_asked & (jnp.argmax(logits, axis=-1) == labels)
    return jnp.sum(is_right, dtype=jnp.float32), jnp.sum(is_asked, dtype=jnp.float32)
