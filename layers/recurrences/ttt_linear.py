"""TTT-linear: a linear map as the state, trained along the sequence to turn keys into values.

  l(W, b; k, v) = |LN(k W + b) - (v - k)|^2 / 2
  W_i = W - eta_i sum_{j <= i} k_j^T g_j,     b_i = b - eta_i sum_{j <= i} g_j
  o_i = z_i + LN(z_i),     z_i = scale q_i W_i + b_i

The sums are over the tokens j of the mini-batch of i, g_j is dl / d(k_j W + b) with the W and b that it started
from, and LN has a learned scale and bias. The next mini-batch starts from W_i and b_i of the last token of this
one. All gradients of a mini-batch are thus taken at once, and its tokens read by a masked product.
"""
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.arrays.exact import exact_einsum
from layers.recurrences.segment_states import FIRST, PADDING, REAL, run_segments

TTTImplementation = Literal["auto", "reference", "chunkwise"]
EPSILON = 1e-6  # added to the variance


class TTTState(NamedTuple):
    """State of the inner training; float32."""

    w: jax.Array           # [b, h, k, k], at the start of the mini-batch
    b: jax.Array           # [b, h, k]
    w_grad: jax.Array      # [b, h, k, k], sum over the tokens of the mini-batch so far
    b_grad: jax.Array      # [b, h, k]
    num_tokens: jax.Array  # [b] int32, of the mini-batch so far; 0 where the next token begins one

    @classmethod
    def start(cls, w: jax.Array, b: jax.Array) -> "TTTState":
        """Returns the state at the start of a mini-batch."""
        return cls(w, b, jnp.zeros_like(w), jnp.zeros_like(b), jnp.zeros(w.shape[0], jnp.int32))


@typed
def ttt_linear(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    eta: Float[Array, "b t h"],
    norm_scale: Float[Array, "h k"],
    norm_bias: Float[Array, "h k"],
    *,
    initial_state: TTTState | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    mini_batch_size: int = 16,
    implementation: TTTImplementation = "auto",
) -> tuple[Float[Array, "b t h k"], TTTState]:
    """Returns every o_t, in the dtype of v, and the state after the last token.

    Learning to learn at test time (arXiv 2407.04620) section 2.5, with the LN of section 2.7.

    Args:
      eta: learning rate of each token, for itself and those before it in its mini-batch.
      norm_scale, norm_bias: those of LN, one per head.
      initial_state: before the first token, anywhere in a mini-batch. None means zeros, and so does the start of a
        segment.
      segment_ids: 0 is padding, whose o is 0 and which leaves the state alone. Mini-batches count from the start
        of each segment; the last state is that of the last segment.
      scale: factor of q; None means 1 / sqrt(k).
      implementation: "reference" runs token by token; "chunkwise" by mini-batches; "auto" is "chunkwise" for more
        than one token without segment_ids, and otherwise "reference".
    Raises:
      NotImplementedError: "chunkwise" with segment_ids.
    """
    scale = k.shape[3] ** -0.5 if scale is None else scale
    if initial_state is None:
        batch, num_heads, width = v.shape[0], *v.shape[2:]
        zeros = partial(jnp.zeros, dtype=jnp.float32)
        initial_state = TTTState.start(zeros((batch, num_heads, width, width)), zeros((batch, num_heads, width)))
    if implementation == "auto":
        implementation = "chunkwise" if segment_ids is None and v.shape[1] > 1 else "reference"
    inputs = tuple(x.astype(jnp.float32) for x in (scale * q, k, v, eta))
    norm = partial(_layer_norm, scale=norm_scale.astype(jnp.float32), bias=norm_bias.astype(jnp.float32))
    if implementation == "chunkwise":
        if segment_ids is not None:
            raise NotImplementedError(
                '"chunkwise" cannot take segment_ids, as mini-batches begin with segments; use "reference"')
        z, last = by_mini_batches(inputs, initial_state, norm, mini_batch_size)
    else:
        run = partial(_by_tokens, norm=norm, mini_batch_size=mini_batch_size)
        z, last = run_segments(run, inputs, initial_state, segment_ids, has_state_per_segment=False, reverse=False)
    o = z + norm(z)
    if segment_ids is not None:
        o = jnp.where((segment_ids != 0)[..., None, None], o, 0)
    return o.astype(v.dtype), last


def _by_tokens(prepared, state: TTTState, *, norm, mini_batch_size: int):
    """Steps through the equations; returns z [b, t, h, k] and the state. See `run_segments` for the arguments."""
    inputs, marks = prepared

    def step(state, token):
        q, k, v, eta, mark = token
        state = _where(mark == FIRST, jax.tree.map(jnp.zeros_like, state), state)
        gradient = _inner_gradient(norm, exact_einsum("bhk,bhkv->bhv", k, state.w) + state.b, v - k)
        w_grad = state.w_grad + k[..., None] * gradient[..., None, :]
        b_grad = state.b_grad + gradient
        taken = _take_step(state, w_grad, b_grad, eta)
        partly = TTTState(state.w, state.b, w_grad, b_grad, state.num_tokens + 1)
        after = _where(partly.num_tokens == mini_batch_size, taken, partly)
        return _where(mark != PADDING, after, state), exact_einsum("bhk,bhkv->bhv", q, taken.w) + taken.b

    marks = jnp.full(inputs[0].shape[:2], REAL) if marks is None else marks
    state, z = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (*inputs, marks)))
    return jnp.swapaxes(z, 0, 1), state


def by_mini_batches(inputs, state: TTTState, norm, size: int):
    """Scans over mini-batches; `state` may be in the middle of the first."""
    length = inputs[0].shape[1]
    # One more full mini-batch, so that no row loses tokens however far into a mini-batch it begins.
    num_batches = -(-length // size) + 1
    place = state.num_tokens[:, None] + jnp.arange(length)  # [b, t]
    rows = jnp.arange(place.shape[0])[:, None]

    def split(x):  # [b, t, ...] -> [mini-batches, b, i, ...]
        moved = jnp.zeros((x.shape[0], num_batches * size, *x.shape[2:]), x.dtype).at[rows, place].set(x)
        return jnp.swapaxes(moved.reshape(x.shape[0], num_batches, size, *x.shape[2:]), 0, 1)

    body = jax.checkpoint(partial(_one_mini_batch, norm), prevent_cse=False)
    state, z = jax.lax.scan(body, state, tuple(split(x) for x in (*inputs, jnp.ones(place.shape, bool))))
    z = jnp.swapaxes(z, 0, 1)
    return z.reshape(z.shape[0], -1, *z.shape[3:])[rows, place], state


def _one_mini_batch(norm, state: TTTState, batch):
    """Runs one mini-batch, whose tokens i read and tokens j are learned from; missing tokens leave no gradient."""
    q, k, v, eta, is_real = batch  # [b, i, h, k], and eta [b, i, h], is_real [b, i]
    gradient = _inner_gradient(norm, exact_einsum("bihk,bhkv->bihv", k, state.w) + state.b[:, None], v - k)
    gradient = jnp.where(is_real[..., None, None], gradient, 0)
    # Each pair counts q_i . k_j for the gradient of W, and 1 for that of b.
    pairs = jnp.tril(exact_einsum("bihk,bjhk->bhij", q, k) + 1)
    learned = exact_einsum("bihk,bhkv->bihv", q, state.w_grad) + state.b_grad[:, None]
    learned = learned + exact_einsum("bhij,bjhv->bihv", pairs, gradient)
    z = exact_einsum("bihk,bhkv->bihv", q, state.w) + state.b[:, None] - eta[..., None] * learned

    w_grad = state.w_grad + exact_einsum("bjhk,bjhv->bhkv", k, gradient)
    b_grad = state.b_grad + jnp.sum(gradient, axis=1)
    num_tokens = state.num_tokens + jnp.sum(is_real, axis=1, dtype=jnp.int32)
    full = _take_step(state, w_grad, b_grad, eta[:, -1])
    return _where(is_real[:, -1], full, TTTState(state.w, state.b, w_grad, b_grad, num_tokens)), z


def _take_step(state: TTTState, w_grad, b_grad, eta) -> TTTState:
    """Takes the step of gradient descent with rate eta [b, h], and starts the next mini-batch."""
    return TTTState.start(state.w - eta[..., None, None] * w_grad, state.b - eta[..., None] * b_grad)


def _inner_gradient(norm, z: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the gradient of |norm(z) - target|^2 / 2 by z."""
    normalized, pull_back = jax.vjp(norm, z)
    return pull_back(normalized - target)[0]


def _layer_norm(z: jax.Array, *, scale: jax.Array, bias: jax.Array) -> jax.Array:
    centred = z - jnp.mean(z, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPSILON) * scale + bias


def _where(condition: jax.Array, x: TTTState, y: TTTState) -> TTTState:
    """Chooses row by row, condition [b]."""
    return jax.tree.map(lambda p, q: jnp.where(condition.reshape(-1, *(1,) * (p.ndim - 1)), p, q), x, y)
