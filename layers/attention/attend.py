"""Attention: the one function for dense, windowed, cached and block-sparse callers."""
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from layers.array_types import Array, Float, typed
from layers.attention.attended import Attended, add_sinks
from layers.attention.block_lists import BlockLists
from layers.attention.block_sparse import attend_to_blocks
from layers.attention.blockwise import attend_blockwise
from layers.attention.dense import attend_dense, attend_reference
from layers.attention.mask import CAUSAL, SAME_SEGMENT, Mask, TokenInfo, check_tokens, pairs, token_info

Implementation = Literal["auto", "reference", "xla", "blockwise", "cudnn", "tokamax", "pallas_tpu", "pallas_gpu"]
DEFAULT_MASK = CAUSAL & SAME_SEGMENT
DENSE = ("reference", "xla", "blockwise", "cudnn", "tokamax")
SPARSE = ("reference", "xla", "pallas_tpu", "pallas_gpu")


@typed
def attend(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n v"],
    *,
    mask: Mask = DEFAULT_MASK,
    q_tokens: TokenInfo | None = None,
    kv_tokens: TokenInfo | None = None,
    blocks: BlockLists | None = None,
    key_bias: Float[Array, "b n s"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "h"] | None = None,
    padding_is_finite: bool = False,
    implementation: Implementation = "auto",
    interpret: Any = False,
) -> Attended:
    """Returns softmax(softcap(scale q k^T) + key_bias) v over the keys a query may see, and its log-sum-exp.

      o, lse = attend(q, k, v, mask=CAUSAL & SAME_SEGMENT & Window(256), q_tokens=token_info(t, segment_ids=ids))

    "Attention Is All You Need" (arXiv 1706.03762), eq. 1. The softmax is in float32; both results have gradients.
    A query that sees nothing gives o = 0, lse = -inf and no gradient. Padding, which is segment 0, neither sees
    nor is seen, and its queries, keys and values may hold anything, NaN too.

    Args:
      q: h query heads; each of the n key heads serves h / n consecutive ones.
      mask: which pairs may attend; see `layers.attention.mask`.
      q_tokens, kv_tokens: position, segment and bits of each query and key, from `token_info`. None for the keys:
        those of the queries, if as many; None for both: positions 0, 1, 2, ... of one segment.
      blocks: for every block of queries, the blocks of keys that it reads at most. Traced values may change from
        call to call without compiling again. None: dense attention, which computes all scores.
      key_bias: a finite logit added to every score of a key, after the soft cap.
      scale: factor of q . k; None means 1 / sqrt(k).
      softcap: scores x become softcap * tanh(x / softcap).
      sinks: per query head, the logit of one more key, whose value is 0 and which every query sees.
      padding_is_finite: a promise that padding holds no NaN and no inf, which saves a copy of the keys and values;
        a cache, which is read at every step, can keep it.
      implementation: "reference" is the float32 spec. Dense: "xla" and "cudnn" (NVIDIA GPUs, bfloat16) are those
        of jax.nn.dot_product_attention, whose matmuls run in the input dtype; "blockwise" never has all scores
        at once, and skips blocks in which no pair is allowed; "tokamax" is that package's choice for the device,
        where it is installed; "auto" means "xla". With blocks: "xla" runs anywhere, in memory that does not grow
        with t * s; "pallas_tpu" and "pallas_gpu" (Hopper, bfloat16) are kernels; "auto" is the kernel of the
        platform that the program is compiled for, or "xla" where it lacks the case, which is logged once.
      interpret: for the kernels, True or parameters of one of Pallas's interpreters: run on any machine, slowly.
    Raises:
      ValueError: heads, lengths, tokens or blocks do not fit each other.
      NotImplementedError: the implementation asked for lacks this case; the message says why.
    """
    reads_lse = sinks is not None or kv_tokens is not None  # keys of a cache: a branch to be merged
    q_tokens, kv_tokens = _check(q, k, mask, q_tokens, kv_tokens, softcap, implementation, blocks)
    if not padding_is_finite:
        q = _without_padding(q, q_tokens)
        k, v = _without_padding(k, kv_tokens), _without_padding(v, kv_tokens)
        key_bias = None if key_bias is None else jnp.where(kv_tokens.segment != 0, key_bias, 0)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if blocks is not None:
        attended = attend_to_blocks(
            q, k, v, blocks, mask=mask, q_tokens=q_tokens, kv_tokens=kv_tokens, key_bias=key_bias, scale=scale,
            softcap=softcap, implementation=implementation, interpret=interpret)
    elif implementation == "reference":
        attended = attend_reference(
            q, k, v, pairs(mask, q_tokens, kv_tokens), key_bias=key_bias, scale=scale, cap=softcap)
    elif implementation == "blockwise":
        attended = attend_blockwise(
            q, k, v, mask=mask, q_tokens=q_tokens, kv_tokens=kv_tokens, key_bias=key_bias, scale=scale,
            cap=softcap)
    else:
        attended = attend_dense(
            q, k, v, pairs(mask, q_tokens, kv_tokens), key_bias=key_bias, scale=scale, cap=softcap,
            reads_lse=reads_lse, implementation="xla" if implementation == "auto" else implementation)
    return attended if sinks is None else add_sinks(*attended, sinks)


def _check(
    q: jax.Array, k: jax.Array, mask: Mask, q_tokens: TokenInfo | None, kv_tokens: TokenInfo | None,
    softcap: float | None, implementation: str, blocks: BlockLists | None,
) -> tuple[TokenInfo, TokenInfo]:
    """Checks how the arguments fit each other, and returns the tokens with their defaults filled in."""
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_key_heads = k.shape[1:3]
    if num_heads % num_key_heads:
        raise ValueError(
            f"q has {num_heads} heads, which is not a multiple of the {num_key_heads} heads of k and v")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap {softcap} must be None or above 0")
    kinds = DENSE if blocks is None else SPARSE
    if implementation != "auto" and implementation not in kinds:
        raise NotImplementedError(
            f'implementation="{implementation}" is not for attention {"without" if blocks is None else "with"} '
            f"blocks; {', '.join(kinds)} are")
    if kv_tokens is None:
        if q_tokens is not None and num_queries != num_keys:
            raise ValueError(
                f"q_tokens is given for {num_queries} queries; give kv_tokens for the {num_keys} keys too")
        kv_tokens = token_info(num_keys) if q_tokens is None else q_tokens
    q_tokens = token_info(num_queries) if q_tokens is None else q_tokens
    for name, tokens, length in (("q_tokens", q_tokens, num_queries), ("kv_tokens", kv_tokens, num_keys)):
        check_tokens(mask, name, tokens, batch=batch, num_key_heads=num_key_heads, length=length)
    return q_tokens, kv_tokens


def _is_all_real(tokens: TokenInfo) -> bool:
    """Whether the tokens are known to hold no padding, before the program runs."""
    return isinstance(tokens.segment, np.ndarray) and bool((tokens.segment != 0).all())


def _without_padding(x: jax.Array, tokens: TokenInfo) -> jax.Array:
    """Replaces [b, t, heads, k] by 0 at padding: a weight of 0 does not hide a NaN."""
    if _is_all_real(tokens):
        return x
    is_real = jnp.asarray(tokens.segment != 0).swapaxes(1, 2)[..., None]  # [r, t, p, 1]
    if is_real.shape[2] > 1:  # one per key head; x may have query heads
        is_real = jnp.repeat(is_real, x.shape[2] // is_real.shape[2], axis=2)
    return jnp.where(is_real, x, 0)
