"""Inputs for attention, of shapes and masks that are easy to get wrong, and a run on them."""
import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers import CAUSAL, SAME_SEGMENT, BlockLists, Mask, TokenInfo, Window, attend, token_info
from layers.attention.block_lists import pack_query_bits
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
    mask: Mask | None = None    # in place of the one that `causal` and `window` make
    softcap: float | None = None
    scale: float | None = None
    offset: int = 0
    segments: bool = False
    positions: bool = False
    token_heads: int = 1        # heads with positions of their own
    bits: bool = False
    key_bias: bool = False
    select: bool = False
    sinks: bool = False
    shared_lists: bool = False  # one for all batch rows
    dense: bool = False         # no lists; keys of the same tokens as the queries, if as many
    dtype: str = "float32"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "k", "v", "blocks", "q_tokens", "kv_tokens", "key_bias", "sinks", "do", "dlse"],
    meta_fields=["mask", "scale", "softcap"])
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of a call, and cotangents of its results."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    blocks: BlockLists | None
    q_tokens: TokenInfo
    kv_tokens: TokenInfo | None
    key_bias: jax.Array | None
    sinks: jax.Array | None
    do: jax.Array
    dlse: jax.Array
    mask: Mask
    scale: float | None
    softcap: float | None

    def replace(self, **changes: Any) -> "Inputs":
        return dataclasses.replace(self, **changes)


class Gradients(NamedTuple):
    """Gradients of the float inputs; None where an input is missing."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    key_bias: jax.Array | None
    sinks: jax.Array | None


def draw_inputs(case: Case, seed: int = 0) -> Inputs:
    draw = Draw(seed)
    rng = draw.rng
    num_i, num_j = -(-case.t // case.block_q), -(-case.s // case.block_k)
    rows = 1 if case.shared_lists else case.b
    block_mask = rng.random((rows, case.lists, num_i, num_j)) < case.density
    block_mask[:, :, 1:2] = False
    block_mask[:, :, :, 2:3] = False
    blocks = None if case.dense else BlockLists.from_block_mask(
        jnp.asarray(block_mask), block_q=case.block_q, block_k=case.block_k)
    q_tokens, kv_tokens = _draw_tokens(case, rng)
    if case.dense and case.t == case.s and case.offset == 0:
        kv_tokens = None
    if case.select and blocks is not None:
        chosen = jnp.asarray(rng.random((rows, case.lists, case.t, num_j)) < 0.7)
        blocks = dataclasses.replace(blocks, rows=pack_query_bits(chosen))
    sinks = draw(case.heads) if case.sinks else None
    mask = SAME_SEGMENT
    if case.causal:
        mask = CAUSAL & mask
    if case.window is not None:
        mask = mask & Window(case.window)
    return Inputs(
        draw(case.b, case.t, case.heads, case.width, dtype=case.dtype),
        draw(case.b, case.s, case.key_heads, case.width, dtype=case.dtype),
        draw(case.b, case.s, case.key_heads, case.value_width, dtype=case.dtype),
        blocks, q_tokens, kv_tokens, draw(case.b, case.key_heads, case.s) if case.key_bias else None, sinks,
        draw(case.b, case.t, case.heads, case.value_width, dtype=case.dtype),
        draw(case.b, case.heads, case.t), case.mask or mask, case.scale, case.softcap)


def _draw_tokens(case: Case, rng: np.random.Generator) -> tuple[TokenInfo, TokenInfo]:
    q_segments = kv_segments = q_bits = kv_bits = None
    q_positions, kv_positions = jnp.arange(case.t)[None] + case.offset, jnp.arange(case.s)[None]
    if case.segments:  # documents, and padding at both ends and between
        q_segments = jnp.asarray(_segments(rng, case.b, case.t))
        kv_segments = q_segments if case.s == case.t else jnp.asarray(_segments(rng, case.b, case.s))
    if case.positions:  # in no order
        q_positions, kv_positions = (
            jnp.asarray(rng.integers(0, 90, (case.b, case.token_heads, length)), jnp.int32)
            for length in (case.t, case.s))
    if case.bits:  # few tokens have any, in runs as long as some blocks
        q_bits, kv_bits = (
            jnp.asarray(np.repeat(rng.choice([0, 0, 0, 1, 6, -2**31], (case.b, -(-length // 8))), 8, axis=1)
                        [:, :length], jnp.int32) for length in (case.t, case.s))
    return (token_info(case.t, positions=q_positions, segment_ids=q_segments, bits=q_bits),
            token_info(case.s, positions=kv_positions, segment_ids=kv_segments, bits=kv_bits))


def _segments(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    ids = np.sort(rng.integers(1, 4, (batch, length)), axis=1)
    ids[:, : length // 20] = ids[:, length - length // 10 :] = 0
    return np.where(np.arange(length) % 17 == 5, 0, ids).astype(np.int32)


@partial(jax.jit, static_argnames=("implementation", "interpret"))
def values_and_gradients(inputs: Inputs, *, implementation: str, interpret: Any = False):
    """(o, lse) and the gradients of the float inputs; where lse is -inf it is told apart as `sees_nothing`."""
    def run(q, k, v, key_bias, sinks):
        return tuple(attend(
            q, k, v, mask=inputs.mask, q_tokens=inputs.q_tokens, kv_tokens=inputs.kv_tokens, blocks=inputs.blocks,
            key_bias=key_bias, scale=inputs.scale, softcap=inputs.softcap, sinks=sinks,
            implementation=implementation, interpret=interpret))

    (o, lse), pull_back = jax.vjp(run, inputs.q, inputs.k, inputs.v, inputs.key_bias, inputs.sinks)
    sees_nothing = lse == -jnp.inf
    gradients = pull_back((inputs.do.astype(o.dtype), jnp.where(sees_nothing, 0, inputs.dlse)))
    return {"o": o, "lse": jnp.where(sees_nothing, 0, lse)}, Gradients(*gradients), sees_nothing


def in_float32(inputs: Inputs) -> Inputs:
    return inputs.replace(**{name: getattr(inputs, name).astype(jnp.float32) for name in ("q", "k", "v", "do")})
