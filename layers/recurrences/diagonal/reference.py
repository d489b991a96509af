"""The definition of the recurrence, one step per token."""
import jax
import jax.numpy as jnp


def sequential(
    x: jax.Array, a: jax.Array, state: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """Runs h_t = a_t h_{t-1} + x_t for x and a [b, t, d] and state [b, d]; returns every h_t, and the last."""
    def step(h, token):
        x_t, a_t = token
        h = a_t * h + x_t
        return h, h

    last, h = jax.lax.scan(step, state, (jnp.swapaxes(x, 0, 1), jnp.swapaxes(a, 0, 1)), reverse=reverse)
    return jnp.swapaxes(h, 0, 1), last
