"""Inputs for block-sparse attention, of shapes and masks that are easy to get wrong, and a run on them."""
import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers import BlockLists, MaskSpec, block_sparse_attention, pack_row_select
from tests.support.inputs import Draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a call. Block 1 of the queries sees nothing, and block 2 of the keys is in no list."""

    b: int = 2
    t: int = 70
    s: int = 70
    heads: int = 4
    key_heads: int = 2
    lists: int = 2
    width: int = 16
    value_width: int = 16
    block_q: int = 16
    block_k: int = 32
    density: float = 0.6
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    offset: int = 0
    segments: bool = False
    positions: bool = False
    select: bool = False
    sinks: bool = False
    shared_lists: bool = False  # one for all batch rows
    dtype: str = "float32"


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    blocks: BlockLists
    mask: MaskSpec
    do: jax.Array
    dlse: jax.Array


def draw_inputs(case: Case, seed: int = 0) -> Inputs:
    draw = Draw(seed)
    rng = draw.rng
    num_i, num_j = -(-case.t // case.block_q), -(-case.s // case.block_k)
    rows = 1 if case.shared_lists else case.b
    block_mask = rng.random((rows, case.lists, num_i, num_j)) < case.density
    block_mask[:, :, 1:2] = False
    block_mask[:, :, :, 2:3] = False
    arrays: dict[str, Any] = {}
    if case.segments:  # documents, and padding at both ends and between
        arrays["segment_ids"] = jnp.asarray(_segments(rng, case.b, case.t))
        arrays["kv_segment_ids"] = arrays["segment_ids"] if case.s == case.t else jnp.asarray(
            _segments(rng, case.b, case.s))
    if case.positions:  # in no order
        arrays["positions"] = jnp.asarray(rng.integers(0, 90, (case.b, case.t)), jnp.int32)
        arrays["kv_positions"] = jnp.asarray(rng.integers(0, 90, (case.b, case.s)), jnp.int32)
    if case.select:
        arrays["row_select"] = pack_row_select(jnp.asarray(rng.random((rows, case.lists, case.t, num_j)) < 0.7))
    if case.sinks:
        arrays["sinks"] = draw(case.heads)
    mask = MaskSpec(causal=case.causal, window=case.window, softcap=case.softcap, scale=case.scale,
                    offset=case.offset, **arrays)
    return Inputs(
        draw(case.b, case.t, case.heads, case.width, dtype=case.dtype),
        draw(case.b, case.s, case.key_heads, case.width, dtype=case.dtype),
        draw(case.b, case.s, case.key_heads, case.value_width, dtype=case.dtype),
        BlockLists.from_block_mask(jnp.asarray(block_mask), block_q=case.block_q, block_k=case.block_k),
        mask,
        draw(case.b, case.t, case.heads, case.value_width, dtype=case.dtype),
        draw(case.b, case.heads, case.t))


def _segments(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    ids = np.sort(rng.integers(1, 4, (batch, length)), axis=1)
    ids[:, : length // 20] = ids[:, length - length // 10 :] = 0
    return np.where(np.arange(length) % 17 == 5, 0, ids).astype(np.int32)


@partial(jax.jit, static_argnames=("implementation", "interpret"))
def values_and_gradients(inputs: Inputs, *, implementation: str, interpret: Any = False):
    """(o, lse) and the gradients of q, k, v and sinks; where lse is -inf it is told apart as `sees_nothing`."""
    def run(q, k, v, sinks):
        mask = dataclasses.replace(inputs.mask, sinks=sinks)
        return block_sparse_attention(
            q, k, v, inputs.blocks, mask=mask, implementation=implementation, interpret=interpret, return_lse=True)

    (o, lse), pull_back = jax.vjp(run, inputs.q, inputs.k, inputs.v, inputs.mask.sinks)
    sees_nothing = lse == -jnp.inf
    gradients = pull_back((inputs.do.astype(o.dtype), jnp.where(sees_nothing, 0, inputs.dlse)))
    return {"o": o, "lse": jnp.where(sees_nothing, 0, lse)}, gradients, sees_nothing


def in_float32(inputs: Inputs) -> Inputs:
    exact = [x.astype(jnp.float32) for x in (inputs.q, inputs.k, inputs.v, inputs.do)]
    return inputs._replace(q=exact[0], k=exact[1], v=exact[2], do=exact[3])
