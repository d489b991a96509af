"""Initial values of the time constants that Mamba-2 and Gated DeltaNet share."""
import jax
import jax.numpy as jnp


def dt_bias_init(key, shape, dtype=jnp.float32):
    """Draws a time step log-uniformly from [1e-3, 1e-1] and returns its inverse softplus."""
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))


def a_log_init(key, shape, dtype=jnp.float32):
    """Draws a decay rate uniformly from [1, 16] and returns its log."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))
