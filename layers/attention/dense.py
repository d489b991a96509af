"""Dense attention: all scores, a mask, a softmax. The reference is the specification of every implementation."""
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Float, typed
from layers.arrays.cost import with_flops
from layers.arrays.exact import exact_einsum
from layers.attention.attended import Attended
from layers.attention.softcap import softcap

KeyBias = Float[Array, "b n s"] | None


@typed
def attend_reference(
    q: Float[Array, "b t h k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n v"],
    allowed: Bool[Array, "r p t s"], *, key_bias: KeyBias = None, scale: float, cap: float | None = None,
) -> Attended:
    """Computes softmax(softcap(scale q k^T) + key_bias) v over allowed pairs, in float32; p = 1, n or h."""
    dtype, num_groups = v.dtype, q.shape[2] // k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, num_groups, axis=2) for x in (k, v))
    scores, _ = softcap(scale * exact_einsum("bthk,bshk->bhts", q, k), cap)
    if key_bias is not None:
        scores += jnp.repeat(key_bias.astype(jnp.float32), num_groups, axis=1)[:, :, None]
    weights, lse = _softmax(scores, jnp.repeat(allowed, q.shape[2] // allowed.shape[1], axis=1))
    return Attended(exact_einsum("bhts,bshv->bthv", weights, v).astype(dtype), lse)


@typed
def attend_dense(
    q: Float[Array, "b t h k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n v"],
    allowed: Bool[Array, "r p t s"], *, key_bias: KeyBias = None, scale: float,
    cap: float | None = None, reads_lse: bool = False, implementation: str = "xla",
) -> Attended:
    """Runs attention over allowed pairs with matmuls in the input dtype and the softmax in float32.

    Args:
      allowed: p = 1 or n, of key heads.
      reads_lse: whether the lse will be read, so that it is worth having both results from one pass over the keys.
    """
    lacks = lacking(implementation, key_bias is not None, cap is not None, q.shape[-1] != v.shape[-1])
    if lacks is not None:
        raise NotImplementedError(f'implementation="{implementation}": {lacks}')
    if implementation == "xla" and (
            reads_lse or key_bias is not None or cap is not None or q.shape[-1] != v.shape[-1]):
        return _attend_xla(q, k, v, allowed, key_bias, scale, cap)
    mask = allowed if allowed.shape[1] == 1 else jnp.repeat(allowed, q.shape[2] // allowed.shape[1], axis=1)
    if implementation == "tokamax":
        o = _tokamax().dot_product_attention(q, k, v, mask=mask, scale=scale)
    else:
        o = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation=implementation)
    o = jnp.where(jnp.any(mask, axis=-1).swapaxes(1, 2)[..., None], o, 0)
    # The compiler leaves this out where nobody reads it; otherwise it takes the scores from the output's program.
    return Attended(o, with_flops("log_sum_exp", 0, _log_sum_exp, scale)(q, k, allowed))


def lacking(implementation: str, has_key_bias: bool, has_cap: bool, widths_differ: bool) -> str | None:
    """Says why a dense implementation cannot run a call; None if it can."""
    if implementation not in ("cudnn", "tokamax"):
        return None
    cases = {"a key_bias": has_key_bias, "a softcap": has_cap, "values of another width than keys": widths_differ}
    missing = [case for case, is_there in cases.items() if is_there]
    return f'{" and ".join(missing)} are not passed on to it; "xla" has them' if missing else None


def _attend_xla(q, k, v, allowed, key_bias, scale, cap) -> Attended:
    batch, length, num_heads, _ = q.shape
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [b, n, s, k], as a cache holds them
    # The queries that share a key head are the rows of one matmul. One asked for by five letters would come out
    # transposed, and its scores be copied: on CPUs that took three times as long.
    queries = q.reshape(batch, length, k.shape[1], -1, q.shape[3]).transpose(0, 2, 3, 1, 4)  # [b, n, g, t, k]
    rows = queries.reshape(batch, k.shape[1], -1, q.shape[3])
    scores = jnp.einsum("bnrk,bnsk->bnrs", rows, k, preferred_element_type=jnp.float32)
    scores, _ = softcap(scores.reshape(*queries.shape[:4], -1) * scale, cap)
    if key_bias is not None:
        scores += key_bias.astype(jnp.float32)[:, :, None, None]
    weights, lse = _softmax(scores, allowed[:, :, None])
    weights = weights.astype(v.dtype).reshape(*rows.shape[:3], -1)
    o = jnp.einsum("bnrs,bnsv->bnrv", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)
    o = o.reshape(*queries.shape[:4], -1).transpose(0, 3, 1, 2, 4)
    return Attended(o.reshape(batch, length, num_heads, -1), lse.reshape(batch, num_heads, length))


def _log_sum_exp(scale: float, q: jax.Array, k: jax.Array, allowed: jax.Array) -> jax.Array:
    """Computes the lse from scores by the matmul of jax.nn, so that XLA finds the two to be the same."""
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if q.dtype == jnp.bfloat16 else None
    queries = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])

    def scores(queries):
        return jnp.einsum("btnk,bsnk->bnts", queries, k, precision=precision, preferred_element_type=jnp.float32)

    _, lse = _softmax(jax.vmap(scores, in_axes=3, out_axes=2)(queries) * scale, allowed[:, :, None])
    return lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def _softmax(scores: jax.Array, allowed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The softmax over allowed keys and its log-sum-exp, with finite gradients where there are none."""
    allowed = jnp.broadcast_to(allowed, scores.shape)
    sees_any = jnp.any(allowed, axis=-1)
    # Finite first, then no weight: -inf - -inf would be NaN in the gradient.
    highest = jnp.max(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min), axis=-1)
    highest = jax.lax.stop_gradient(highest)
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - highest[..., None], 0)), 0)
    total = jnp.where(sees_any, jnp.sum(weights, axis=-1), 1)
    return weights / total[..., None], jnp.where(sees_any, highest + jnp.log(total), -jnp.inf)


def _tokamax() -> ModuleType:
    try:
        flags = importlib.import_module("absl.flags").FLAGS
        if not flags.is_parsed():  # tokamax would read the command line for flags of its own, and refuse others
            flags.mark_as_parsed()
        return importlib.import_module("tokamax")
    except ImportError as error:
        raise NotImplementedError(
            f'implementation="tokamax" needs that package ({error}); pip install tokamax, or use "xla"') from error
