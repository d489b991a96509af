"""RG-LRU, the gated diagonal recurrence of Griffin, with a real or a complex state."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.arrays.segments import segment_starts
from layers.recurrences.diagonal import DiagonalImplementation, diagonal_recurrence

DECAY_SHARPNESS = 8.0       # c in the paper: how far the gate can move the decay
LARGEST_SQRT_SLOPE = 1000.0


class RGLRUState(NamedTuple):
    """State of an RG-LRU between two tokens."""

    h: jax.Array          # [b, d] float32; a complex state has all real parts, then all imaginary ones
    has_begun: jax.Array  # [b] bool: False before the first token of a document, which enters in full

    @classmethod
    def empty(cls, batch: int, width: int) -> "RGLRUState":
        """The state before the first token."""
        return cls(jnp.zeros((batch, width), jnp.float32), jnp.zeros(batch, bool))


@typed
def rg_lru(
    x: Float[Array, "b t d"],
    input_gate: Float[Array, "b t gate"],
    recurrence_gate: Float[Array, "b t gate"],
    a_param: Float[Array, "gate"],
    *,
    a_imag_param: Float[Array, "gate"] | None = None,
    initial_state: RGLRUState | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: DiagonalImplementation = "auto",
) -> tuple[Float[Array, "b t d"], RGLRUState]:
    """Runs h_t = a_t h_{t-1} + sqrt(1 - |a_t|^2) sigmoid(input_gate_t) x_t; returns every h_t, and the last state.

    Griffin (arXiv 2402.19427) eq. 1 to 4: log a_t = -8 sigmoid(recurrence_gate_t) softplus(a_param). The first
    token of a segment enters with a factor of 1 in place of the square root, as it replaces nothing.
    With a_imag_param (appendix B) the state is complex, and the phase of a_t is a_imag_param times its gate; x and
    every h_t hold all real parts and then all imaginary ones, and so are twice as wide as the gates.

    Args:
      input_gate, recurrence_gate: logits, before the sigmoid.
      initial_state: None means that the first token of each row begins a segment.
      segment_ids: 0 is padding, whose h is 0 and which leaves the state alone. The last state is that of the
        last segment.
      implementation: see `diagonal_recurrence`.
    Raises:
      ValueError: the gates are not as wide as the state.
    """
    parts = 1 if a_imag_param is None else 2
    if x.shape[2] != parts * a_param.shape[0]:
        raise ValueError(
            f"x has width {x.shape[2]}, which must be {parts} x {a_param.shape[0]}, that of a_param and the gates"
            + (": real parts, then imaginary ones" if parts == 2 else "; a complex state needs a_imag_param"))
    if initial_state is None:
        initial_state = RGLRUState.empty(x.shape[0], x.shape[2])
    if segment_ids is None:
        segment_ids = jnp.ones(x.shape[:2], jnp.int32)
    is_real = segment_ids != 0
    is_first = jnp.cumsum(is_real, axis=1) == 1
    starts = segment_starts(segment_ids) & ~(is_first & initial_state.has_begun[:, None])
    h = jnp.where(initial_state.has_begun[:, None], initial_state.h, 0)

    openness = jax.nn.sigmoid(recurrence_gate.astype(jnp.float32))
    log_a = -DECAY_SHARPNESS * openness * jax.nn.softplus(a_param.astype(jnp.float32))  # [b, t, gate]
    # expm1: where a rounds to 1, 1 - a^2 would be 0.
    scale = jnp.where(starts[..., None], 1, sqrt_of_bounded_slope(-jnp.expm1(2 * log_a)))
    scale = scale * jax.nn.sigmoid(input_gate.astype(jnp.float32))
    if a_imag_param is None:
        y, h = diagonal_recurrence(
            scale * x.astype(jnp.float32), log_a=log_a, initial_state=h, segment_ids=segment_ids,
            implementation=implementation)
    else:
        phase = a_imag_param.astype(jnp.float32) * openness
        a = jnp.exp(log_a) * jax.lax.complex(jnp.cos(phase), jnp.sin(phase))
        y, h = diagonal_recurrence(
            scale * _to_complex(x), a=a, initial_state=_to_complex(h), segment_ids=segment_ids,
            implementation=implementation)
        y, h = _from_complex(y), _from_complex(h)
    return y.astype(x.dtype), RGLRUState(h, initial_state.has_begun | jnp.any(is_real, axis=1))


@jax.custom_jvp
def sqrt_of_bounded_slope(x: jax.Array) -> jax.Array:
    """Takes the square root with a slope of at most 1000; that of sqrt(1 - a^2) is infinite where a = 1."""
    return jnp.sqrt(x)


@sqrt_of_bounded_slope.defjvp
def _sqrt_of_bounded_slope_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    slope = 0.5 * jax.lax.rsqrt(jnp.maximum(x, 0.25 / LARGEST_SQRT_SLOPE**2))
    return sqrt_of_bounded_slope(x), slope * tangent


def _to_complex(x: jax.Array) -> jax.Array:
    return jax.lax.complex(*jnp.split(x.astype(jnp.float32), 2, axis=-1))


def _from_complex(x: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.real(x), jnp.imag(x)], axis=-1)
