"""A maximum that fades, m_t = max(m_{t-1} + f_t, x_t), which keeps exponential gates in range."""
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.recurrences.log_decay import NOTHING_LEFT
from layers.recurrences.segment_states import FIRST, PADDING, run_segments


@typed
def fading_max_before(
    x: Float[Array, "b t h"],
    f: Float[Array, "b t h"],
    initial_max: Float[Array, "b h"] | Float[Array, "b e h"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t h"], Float[Array, "b h"] | Float[Array, "b e h"]]:
    """Returns every m_{t-1} and the last m, in float32.

    Args:
      f: <= 0, the change of the maximum before each token.
      initial_max: before the first token, or one for each of e segments; further segments of a row begin with 0.
      segment_ids: 0 is padding, which leaves the maximum alone; see `run_segments`.
    """
    def run(prepared, initial):
        (x, f), marks = prepared
        if marks is not None:
            is_real, begins = (marks != PADDING)[..., None], (marks == FIRST)[..., None]
            x, f = jnp.where(is_real, x, NOTHING_LEFT), jnp.where(is_real, f, 0)
            # A first token continues from 0: the previous maximum falls without end.
            x, f = jnp.where(begins, jnp.maximum(x, f), x), jnp.where(begins, NOTHING_LEFT, f)
        # A scan is fastest on a CPU and slowest elsewhere.
        m = jax.lax.platform_dependent(x, f, initial, cpu=_sequential, default=_associative)
        before = jnp.concatenate([initial[:, None], m[:, :-1]], axis=1)
        return before if marks is None else jnp.where(is_real & ~begins, before, 0), m[:, -1]

    inputs = (x.astype(jnp.float32), f.astype(jnp.float32))
    return run_segments(run, inputs, initial_max.astype(jnp.float32), segment_ids,
                        has_state_per_segment=initial_max.ndim == 3, reverse=False)


def _sequential(x: jax.Array, f: jax.Array, initial: jax.Array) -> jax.Array:
    def step(m, token):
        x_t, f_t = token
        m = jnp.maximum(m + f_t, x_t)
        return m, m

    return jnp.swapaxes(jax.lax.scan(step, initial, (jnp.swapaxes(x, 0, 1), jnp.swapaxes(f, 0, 1)))[1], 0, 1)


def _associative(x: jax.Array, f: jax.Array, initial: jax.Array) -> jax.Array:
    def compose(earlier, later):
        (x_1, f_1), (x_2, f_2) = earlier, later
        return jnp.maximum(x_1 + f_2, x_2), f_1 + f_2

    x = x.at[:, 0].max(initial + f[:, 0])
    return jax.lax.associative_scan(compose, (x, f), axis=1)[0]
