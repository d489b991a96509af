"""Continues many texts at once: one program for a prompt length, one for every token after it."""
import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hnet.decode_state import StageState, init_decode_state
from hnet.model import HNetLM
from layers import last_real

SMALLEST_BUCKET = 16  # prompts are padded to a power of two, from here on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. Filters apply one after the other, each to what the one before left."""

    temperature: float = 1.0  # 0 = always the most probable token
    top_k: int = 0            # keep the k most probable; 0 = all
    top_p: float = 1.0        # keep the fewest tokens whose probabilities reach p
    min_p: float = 0.0        # keep tokens at least this probable, relative to the most probable one

    def __post_init__(self):
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"{self}: temperature and top_k must be >= 0, top_p in (0, 1], min_p in [0, 1]")


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token per row: logits [b, vocab], one key per row [b] -> int32 [b]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)  # most probable first, so filters cut off a tail
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


def generate(
    model: HNetLM,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    sampling: Sampling = Sampling(),
    seeds: Sequence[int] | None = None,
    eos: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next token of every prompt, [b] int32, up to `num_tokens` times.

    A row depends on its own prompt and seed alone, whatever else is in the batch.

    Args:
      prompts: token ids, at least one per row; rows may differ in length.
      seeds: one per row; None means 0, 1, 2, ...
      eos: the token that ends a row. Such a row yields -1 from then on, and all rows ended end the iteration.
    Raises:
      ValueError: an empty prompt, not one seed per prompt, or a model whose chunk capacity is not full.
    """
    for index, stage in enumerate(model.config.stages[:-1]):
        if stage.capacity < 1:  # a prompt would lose boundaries that single tokens keep
            raise ValueError(f"stage{index}.capacity is {stage.capacity}; decoding needs 1 (full), which the same "
                             "parameters fit: replace it in the config of the model")
    lengths = np.array([len(prompt) for prompt in prompts])
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("every prompt needs at least one token; begin a new document with the model's BOS")
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
    size = max(SMALLEST_BUCKET, 1 << int(lengths.max() - 1).bit_length())
    tokens, segment_ids = np.zeros((2, len(prompts), size), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], segment_ids[row, : len(prompt)] = prompt, 1

    prefill, step = _programs(model, sampling)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    # A multiple of the bucket, so that asking for a few more tokens does not compile anew.
    state = init_decode_state(model.config, len(prompts), size * -(-(lengths.max() + num_tokens) // size))
    active = np.ones(len(prompts), bool)
    for index in range(num_tokens):
        if index == 0:
            token, state = prefill(params, tokens, segment_ids, state, keys)
        else:
            token, state = step(params, token, active, state, keys, index)
        drawn = np.where(active, token, -1)
        yield drawn
        if eos is not None:
            active &= drawn != eos
            if not active.any():
                return


@cache
def _programs(model: HNetLM, sampling: Sampling):
    def advance(params: Any, tokens: jax.Array, segment_ids: jax.Array, state: StageState, keys: jax.Array, index):
        output = model.apply({"params": params}, tokens, segment_ids, state)
        logits = last_real(output.logits, segment_ids)
        return sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, index), sampling), output.state

    @partial(jax.jit, donate_argnums=3)
    def prefill(params, tokens, segment_ids, state, keys):
        return advance(params, tokens, segment_ids, state, keys, 0)

    @partial(jax.jit, donate_argnums=3)
    def step(params, token, active, state, keys, index):
        return advance(params, token[:, None], active[:, None].astype(jnp.int32), state, keys, index)

    return prefill, step
