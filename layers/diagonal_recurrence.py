"""A vector state that decays by channel: RG-LRU, HGRN, minGRU, and with complex numbers S4D, S5 and LRU."""
from typing import Literal

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Inexact, Int, typed
from layers.segment_states import over_segments

DiagonalImplementation = Literal["auto", "reference", "associative"]


@typed
def diagonal_recurrence(
    x: Inexact[Array, "b t d"],
    *,
    a: Inexact[Array, "b t d"] | None = None,
    log_a: Float[Array, "b t d"] | None = None,
    initial_state: Inexact[Array, "b d"] | Inexact[Array, "b n d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    reverse: bool = False,
    implementation: DiagonalImplementation = "auto",
) -> tuple[Inexact[Array, "b t d"], Inexact[Array, "b d"] | Inexact[Array, "b n d"]]:
    """Runs h_t = a_t h_{t-1} + x_t over t; returns every h_t, in the dtype of x, and the last one.

    Griffin (arXiv 2402.19427) eq. 4 and HGRN (2311.04823) eq. 4, with the gate of the input left to the caller.
    The state is float32, or complex64 where x or a is complex.

    Args:
      a: factor per step and channel, signed or complex, of magnitude 1 at most.
      log_a: or its natural log, <= 0, float32 inside; exactly one of the two.
      initial_state: before the first token; or one for each of n segments. None means zeros.
      segment_ids: 0 is padding, whose y is 0 and which leaves the state alone; see `over_segments`.
      reverse: run from the last token to the first.
      implementation: "reference" is a scan, one step per token, which a CPU runs fastest; "associative" a
        parallel scan; "auto" is "reference" for a single token and in programs for a CPU, else "associative".
    Raises:
      ValueError: both of a and log_a are given, or neither.
    """
    if (a is None) == (log_a is None):
        raise ValueError("give exactly one of a and log_a")
    is_complex = any(jnp.iscomplexobj(z) for z in (x, a, initial_state) if z is not None)
    dtype = jnp.complex64 if is_complex else jnp.float32
    a = (jnp.exp(log_a.astype(jnp.float32)) if a is None else a).astype(dtype)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], x.shape[2]), dtype)

    def run(tokens, state, is_real, begins):
        x, a = (jnp.where(is_real[..., None], z, inert) for z, inert in zip(tokens, (0, 1), strict=True))
        a = a if begins is None else jnp.where(begins[..., None], 0, a)
        h, last = _recur(x, a, state, implementation)
        return jnp.where(is_real[..., None], h, 0), last

    y, last = over_segments(run, (x.astype(dtype), a), initial_state.astype(dtype), segment_ids,
                            has_one_each=initial_state.ndim == 3, reverse=reverse)
    return y.astype(jnp.promote_types(x.dtype, jnp.complex64) if is_complex else x.dtype), last


def _recur(x, a, state, implementation):
    if implementation == "auto" and x.shape[1] > 1:
        return jax.lax.platform_dependent(x, a, state, cpu=sequential, default=associative)
    return (associative if implementation == "associative" else sequential)(x, a, state)


def sequential(x: jax.Array, a: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(h, token):
        x_t, a_t = token
        h = a_t * h + x_t
        return h, h

    last, h = jax.lax.scan(step, state, (jnp.swapaxes(x, 0, 1), jnp.swapaxes(a, 0, 1)))
    return jnp.swapaxes(h, 0, 1), last


def associative(x: jax.Array, a: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    def compose(earlier, later):
        (a_1, x_1), (a_2, x_2) = earlier, later
        return a_2 * a_1, a_2 * x_1 + x_2

    x = x.at[:, 0].add(a[:, 0] * state)
    h = jax.lax.associative_scan(compose, (a, x), axis=1)[1]
    return h, h[:, -1]
