"""The recurrence under all layers with a matrix state: its sequential spec, and a chunkwise form for training.

  S_t = diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,      o_t = S_t^T q_t

S is [k, v], g <= 0 the log decay, per head or per key channel. Without a and b it is gated linear attention; with
b = -k and a = exp(g) beta k the gated delta rule; with any a and b RWKV-7. Public functions with the papers' names
are in gated_linear_attention.py, gated_delta_rule.py and dplr_recurrence.py.

Inside a chunk, u_i = a_i^T S_{i-1} solves a triangular system (the WY form, arXiv 2406.06484; with two matrices,
arXiv 2503.14456). Decays between two tokens are exponentials of sums over just the tokens between, so that none is
above 1 and none is the quotient of two that vanish: a difference of running sums would lose small decays behind a
large one. Per head these sums are a matrix per chunk; per channel one for each channel, of shorter chunks.

A segment that begins within a row does so with a decay of zero, and with a = 0: what a state was no longer counts.
Padding is inert: it decays by nothing, writes nothing, and reads 0. What else segments mean: `segment_states.py`.
"""
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from layers.segment_states import over_segments

MatrixImplementation = Literal["auto", "reference", "chunkwise"]
NOTHING_LEFT = -1e30              # log of a decay to 0, whose sums stay finite
CHUNK_OF_HEADS, CHUNK_OF_CHANNELS = 32, 16  # tokens, by what decays


class Tokens(NamedTuple):
    """What each step reads and writes; a and b are both None, or neither. Heads of all are the same."""

    q: jax.Array                # [b, t, h, k]
    k: jax.Array                # [b, t, h, k]
    v: jax.Array                # [b, t, h, v]
    log_decay: jax.Array        # [b, t, h, 1 or k] float32
    a: jax.Array | None = None  # [b, t, h, k]
    b: jax.Array | None = None  # [b, t, h, k]


def matrix_recurrence(
    tokens: Tokens, initial_state: jax.Array | None, segment_ids: jax.Array | None,
    implementation: MatrixImplementation, *, reverse: bool = False, reads_before: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns every o_t [b, t, h, v] in v's dtype, and the last state, float32 and shaped as the initial one.

    Args:
      initial_state: [b, h, k, v] enters the first token, and further segments begin with zeros; the last state is
        that of the last segment. [b, n, h, k, v] holds one per segment, n at least the segments of any row, and so
        does the last state; this costs n times the work.
      segment_ids: [b, t]; None means one segment per row.
      reverse: run from the last token to the first, where the initial state enters.
      reads_before: o_t reads S_{t-1}, before it decays.
    """
    batch, _, num_heads = tokens.v.shape[:3]
    if initial_state is None:
        initial_state = jnp.zeros((batch, num_heads, tokens.k.shape[-1], tokens.v.shape[-1]), jnp.float32)
    run = partial(_run, implementation=implementation, reads_before=reads_before)
    return over_segments(
        run, tokens, initial_state, segment_ids, has_one_each=initial_state.ndim == 5, reverse=reverse)


def _run(
    tokens: Tokens, initial_state: jax.Array, is_real: jax.Array, begins: jax.Array | None, *,
    implementation: MatrixImplementation, reads_before: bool,
) -> tuple[jax.Array, jax.Array]:
    inert = jax.tree.map(lambda x: jnp.where(is_real[..., None, None], x, jnp.zeros((), x.dtype)), tokens)
    if begins is not None:
        begins = begins[..., None, None]
        inert = inert._replace(log_decay=jnp.where(begins, NOTHING_LEFT, inert.log_decay))
        # Nor may what reads the state before its decay see another segment's.
        for name in ["a"] * (inert.a is not None) + ["q"] * reads_before:
            reader = getattr(inert, name)
            inert = inert._replace(**{name: jnp.where(begins, jnp.zeros((), reader.dtype), reader)})
    if implementation == "auto":
        implementation = "reference" if tokens.v.shape[1] == 1 else "chunkwise"
    recur = {"reference": sequential, "chunkwise": chunkwise}[implementation]
    o, state = recur(inert, initial_state.astype(jnp.float32), reads_before)
    return o.astype(tokens.v.dtype), state


def sequential(tokens: Tokens, state: jax.Array, reads_before: bool) -> tuple[jax.Array, jax.Array]:
    """Token by token, as the equation says; float32."""
    dot = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def step(state, token):
        token = jax.tree.map(lambda x: x.astype(jnp.float32), token)
        before = state
        state = jnp.exp(token.log_decay)[..., None] * state + dot("bhk,bhv->bhkv", token.k, token.v)
        if token.a is not None:
            state = state + dot("bhk,bhv->bhkv", token.b, dot("bhk,bhkv->bhv", token.a, before))
        return state, dot("bhkv,bhk->bhv", before if reads_before else state, token.q)

    state, o = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens))
    return jnp.swapaxes(o, 0, 1), state


def chunkwise(tokens: Tokens, state: jax.Array, reads_before: bool) -> tuple[jax.Array, jax.Array]:
    """A scan over chunks with matmuls inside, which its backward pass computes again."""
    length = tokens.v.shape[1]
    size = min(length, CHUNK_OF_HEADS if tokens.log_decay.shape[-1] == 1 else CHUNK_OF_CHANNELS)

    def chunks(x):  # [b, t, h, ...] -> [chunks, b, h, size, ...]; zeros are inert
        x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    body = jax.checkpoint(partial(_one_chunk, reads_before), prevent_cse=False)
    state, o = jax.lax.scan(body, state, jax.tree.map(chunks, tokens))
    o = jnp.moveaxis(o, (0, 2), (1, 3))  # [b, chunks, size, h, v]
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length], state


def _one_chunk(reads_before: bool, state: jax.Array, chunk: Tokens) -> tuple[jax.Array, jax.Array]:
    """Advances the state [b, h, k, v] over one chunk. i reads, j writes; both count its tokens."""
    q, k, v, log_decay, *low_rank = (x.astype(jnp.float32) for x in chunk if x is not None)
    dot = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    between, from_start = _sums_between(log_decay), running_sum(log_decay)  # [b, h, i, j, c], [b, h, i, c]
    up_to_self = _Decays.of(between, from_start, diagonal=0)
    # What reads S_{i-1}, before it decays: sums over j < l < i.
    before_self = _Decays.of(_one_later(between), _one_later(from_start), diagonal=-1)

    writes = [(k, v)]
    if low_rank:
        a, b = low_rank
        read = dot("bhik,bhkv->bhiv", a * before_self.from_start, state)
        read = read + dot("bhij,bhjv->bhiv", _pairs(a, k, before_self), v)
        inverse = unit_lower_inverse(-_pairs(a, b, before_self))
        writes.append((b, dot("bhij,bhjv->bhiv", inverse, read)))

    decays = before_self if reads_before else up_to_self
    o = dot("bhik,bhkv->bhiv", q * decays.from_start, state)
    to_end = up_to_self.between[:, :, -1]  # [b, h, j, c]
    state = up_to_self.from_start[:, :, -1, :, None] * state
    for key, value in writes:
        o = o + dot("bhij,bhjv->bhiv", _pairs(q, key, decays), value)
        state = state + dot("bhjk,bhjv->bhkv", key * to_end, value)
    return state, o


class _Decays(NamedTuple):
    """What is left at token i of what token j wrote, and of the state that entered the chunk."""

    between: jax.Array     # [b, h, i, j, 1 or k]; 0 where j is too late for i
    from_start: jax.Array  # [b, h, i, 1 or k]

    @classmethod
    def of(cls, between: jax.Array, from_start: jax.Array, *, diagonal: int) -> "_Decays":
        in_time = jnp.tril(jnp.ones(between.shape[2:4], bool), diagonal)[..., None]
        # Masked before the exponential: what it would be of other pairs, infinite, has a gradient of NaN.
        return cls(jnp.exp(jnp.where(in_time, between, NOTHING_LEFT)), jnp.exp(from_start))


def _pairs(x: jax.Array, y: jax.Array, decays: _Decays) -> jax.Array:
    """[b, h, i, j]: x_i . y_j, each product decayed."""
    if decays.between.shape[-1] == 1:
        return jnp.einsum("bhik,bhjk->bhij", x, y, precision=jax.lax.Precision.HIGHEST) * decays.between[..., 0]
    # No matmul could do it, and none is needed: one fused pass over the pairs.
    return jnp.sum(x[:, :, :, None] * y[:, :, None] * decays.between, axis=-1)


def _one_later(sums: jax.Array) -> jax.Array:
    """The sums of token i - 1 in the place of i, along axis 2; 0 for the first."""
    return jnp.concatenate([jnp.zeros_like(sums[:, :, :1]), sums[:, :, :-1]], axis=2)


def _sums_between(log_decay: jax.Array) -> jax.Array:
    """[..., l, c] -> [..., i, j, c], the sum over j < l <= i, each added up for itself; 0 where that is empty."""
    length = log_decay.shape[-2]
    after = jnp.tril(jnp.ones((length, length), jnp.float32), -1)  # [l, j]
    masked = after[..., None] * log_decay[..., :, None, :]           # [..., l, j, c]
    return running_sum(masked.reshape(*masked.shape[:-2], -1)).reshape(masked.shape)


def running_sum(x: jax.Array) -> jax.Array:
    """Cumulative sum over the second last axis, as a matmul: faster than a windowed reduction at these lengths."""
    ones = jnp.tril(jnp.ones((x.shape[-2],) * 2, x.dtype))
    return jnp.matmul(ones, x, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def unit_lower_inverse(strictly_lower: jax.Array) -> jax.Array:
    """(1 + A)^-1 of a strictly lower triangular A [..., i, i], by blocks of doubled size.

    Products of the off-diagonal blocks alone, no powers of A: those of similar keys grow without bound.
    """
    length = strictly_lower.shape[-1]
    index = jnp.arange(length)
    inverse = jnp.broadcast_to(jnp.eye(length, dtype=strictly_lower.dtype), strictly_lower.shape)
    size = 1
    while size < length:
        # Within blocks of twice the size, the part below the two whose inverses are there.
        pair, half = index // (2 * size), index // size % 2
        below = (pair[:, None] == pair) & (half[:, None] == 1) & (half == 0)
        off_diagonal = jnp.where(below, strictly_lower, 0)
        inverse = inverse - _exact_matmul(_exact_matmul(inverse, off_diagonal), inverse)
        size *= 2
    return inverse


def _exact_matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _unit_lower_inverse_fwd(strictly_lower):
    inverse = unit_lower_inverse(strictly_lower)
    return inverse, inverse


def _unit_lower_inverse_bwd(inverse, gradient):
    # d (1 + A)^-1 = -(1 + A)^-1 dA (1 + A)^-1, of which A has the part below the diagonal.
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (-jnp.tril(_exact_matmul(_exact_matmul(transposed, gradient), transposed), -1),)


unit_lower_inverse.defvjp(_unit_lower_inverse_fwd, _unit_lower_inverse_bwd)


def per_head(x: jax.Array, v: jax.Array, name: str) -> jax.Array:
    """Heads of q or k [b, t, g, k], each repeated for the value heads that it serves: [b, t, h, k]."""
    if v.shape[2] % x.shape[2]:
        raise ValueError(f"{name} has {x.shape[2]} heads, which must divide the {v.shape[2]} of v; arrays are "
                         "time first, [b, t, heads, width]")
    return jnp.repeat(x, v.shape[2] // x.shape[2], axis=2)


def per_key(log_decay: jax.Array | None, q: jax.Array) -> jax.Array:
    """[b, t, h, 1 or k] float32, zeros for None."""
    if log_decay is None:
        return jnp.zeros((*q.shape[:3], 1), jnp.float32)
    log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
    return log_decay.astype(jnp.float32)
