"""Attention with rows and heads spread over a mesh."""
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from layers.attention.attend import DEFAULT_MASK, Implementation, attend
from layers.attention.attended import Attended
from layers.attention.block_lists import BlockLists
from layers.attention.mask import Mask, TokenInfo


def sharded_attend(
    mesh: Mesh,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask = DEFAULT_MASK,
    q_tokens: TokenInfo | None = None,
    kv_tokens: TokenInfo | None = None,
    blocks: BlockLists | None = None,
    key_bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    padding_is_finite: bool = False,
    implementation: Implementation = "auto",
    interpret: Any = False,
    batch_axis: str | None = "data",
    head_axis: str | None = "model",
) -> Attended:
    """Runs `attend`, whose arguments these are, on every device for its own rows and heads.

    The compiler cannot split a kernel by itself. Arrays with a leading axis of 1 are replicated, others are split
    with their rows and heads.

    Args:
      batch_axis, head_axis: axes of `mesh`; None keeps rows, or heads, whole.
    """
    rows = {1: None, q.shape[0]: batch_axis}
    heads = {1: None, k.shape[2]: head_axis, q.shape[2]: head_axis}

    def by_row_and_head(x):
        return PartitionSpec(rows[x.shape[0]], heads[x.shape[1]])

    arrays = dict(q_tokens=q_tokens, kv_tokens=kv_tokens, blocks=blocks, key_bias=key_bias)
    specs = jax.tree.map(by_row_and_head, arrays) | dict(sinks=None if sinks is None else PartitionSpec(head_axis))
    arrays |= dict(sinks=sinks)
    tokens = PartitionSpec(batch_axis, None, head_axis)

    def run(q, k, v, arrays):
        return attend(q, k, v, mask=mask, scale=scale, softcap=softcap, padding_is_finite=padding_is_finite,
                      implementation=implementation, interpret=interpret, **arrays)

    return jax.shard_map(
        run, mesh=mesh, in_specs=(tokens, tokens, tokens, specs),
        out_specs=Attended(tokens, PartitionSpec(batch_axis, head_axis)),
        check_vma=False,  # kernels do not say which mesh axes their outputs vary over
    )(q, k, v, arrays)
