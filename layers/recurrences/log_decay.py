"""Logs of decays, natural and at most 0, which all recurrences take."""
import jax
import jax.numpy as jnp

NOTHING_LEFT = -1e30  # log of a decay to 0, whose sums stay finite


def check_log_decay(log_decay: jax.Array, name: str = "log_decay") -> None:
    """Under `jax.debug_nans`, refuses decays that make a state grow: outputs overflow many tokens later."""
    def check(largest):
        if largest > 0:
            raise ValueError(
                f"{name} is as large as {float(largest)}; it is the natural log of a decay, at most 0")

    if jax.config.jax_debug_nans:
        jax.debug.callback(check, jnp.max(log_decay))
