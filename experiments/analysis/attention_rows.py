"""Attention of single heads, row by row: weights are computed a layer at a time and never held for all of them."""
import dataclasses
import math
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.analysis.boundaries import byte_boundaries
from hnet import HNetConfig, HNetLM


@dataclasses.dataclass(frozen=True, eq=False)
class RunOfHeads:
    """Queries and keys of equal attention layers that read one text.

    Attributes:
      stage, part, run: the place of the layers: a stage, its "encoder" or "decoder", and the run of that layout.
      first_layer: number of its first layer among those of the layout.
      queries: [l, t, h, k] after rotation.
      keys: [l, t, n, k] likewise; each serves h / n consecutive heads.
      window: earlier tokens that are seen; None = all.
      slots: [t] for every token of the text, the row of queries that it belongs to: its own, or its chunk's.
    """

    stage: str
    part: str
    run: int
    first_layer: int
    queries: jax.Array
    keys: jax.Array
    window: int | None
    slots: np.ndarray

    def attention(self, rows: np.ndarray, is_wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the weight that rows give to wanted rows, and the row that gets most, both [l, h, r].

        Args:
          rows: [r] numbers of rows that attend.
          is_wanted: [r, t] which rows count.
        """
        mass, top = _attention(self.queries[:, rows], self.keys, rows, is_wanted, self.window)
        return np.asarray(mass), np.asarray(top)


def read_heads(config: HNetConfig, params: Any, tokens: np.ndarray) -> tuple[list[RunOfHeads], np.ndarray]:
    """Reads a text [t] at full capacity; returns its attention layers, and the nats of each next token [t - 1]."""
    (nats, stages), sown = _program(config)(params, tokens[None])
    slots = token_slots(jax.device_get(stages), len(tokens))
    return list(_runs_of_heads(config, sown.get("intermediates", {}), slots)), np.asarray(nats)


def token_slots(stages: Mapping[str, Any], length: int) -> dict[str, np.ndarray]:
    """Returns, for every stage, the row that each token belongs to: that of the chunk it is in."""
    slots = {"stage0": np.arange(length)}
    for index, (position, _, is_boundary) in enumerate(byte_boundaries(stages, 0).values()):
        starts = position[is_boundary]
        slots[f"stage{index + 1}"] = np.searchsorted(starts, np.arange(length), side="right") - 1
    return slots


@cache
def _program(config: HNetConfig) -> Any:
    model = HNetLM(config.at_full_capacity())

    def read(params, tokens):
        output, sown = model.apply({"params": params}, tokens, mutable=["intermediates"])
        logits = output.logits[0, :-1]
        nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, tokens[0, 1:, None], axis=-1)[:, 0]
        return (nats, output.stages), sown

    return jax.jit(read)


def _runs_of_heads(config: HNetConfig, sown: Mapping[str, Any], slots: Mapping[str, np.ndarray]):
    """Yields what `Attention` layers sowed, from the outermost stage in."""
    from hnet.layout import parse_layout

    inside = sown
    for index, stage in enumerate(config.stages):
        name = f"stage{index}"
        inside = inside.get(name, {})
        for part in ("encoder", "decoder"):
            first_layer = 0
            for run, (_, count) in enumerate(parse_layout(getattr(stage, part))):
                mixer = inside.get(part, {}).get(f"run{run}", {}).get("mixer", {})
                if "queries" in mixer and "keys" in mixer:
                    (queries,), (keys,) = mixer["queries"], mixer["keys"]
                    yield RunOfHeads(name, part, run, first_layer, queries[:, 0], keys[:, 0],
                                     stage.stack.attention.window, slots[name])
                first_layer += count


@partial(jax.jit, static_argnames="window")
def _attention(
    queries: jax.Array, keys: jax.Array, rows: jax.Array, is_wanted: jax.Array, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Sums and finds the largest of softmax(q k^T / sqrt(k)) over wanted and over all keys, layer by layer."""
    behind = rows[:, None] - jnp.arange(keys.shape[1])[None]
    sees = (behind >= 0) & (behind <= (keys.shape[1] if window is None else window))  # [r, t]

    def one_layer(layer):
        q, k = layer  # [r, h, k], [t, n, k]
        num_rows, num_heads, width = q.shape
        q = q.reshape(num_rows, k.shape[1], -1, width)
        scores = jnp.einsum("rngk,tnk->ngrt", q, k, preferred_element_type=jnp.float32) / math.sqrt(width)
        weights = jax.nn.softmax(jnp.where(sees, scores, -jnp.inf), axis=-1).reshape(num_heads, num_rows, -1)
        return jnp.sum(jnp.where(is_wanted, weights, 0), axis=-1), jnp.argmax(weights, axis=-1)

    return jax.lax.map(one_layer, (queries, keys))
