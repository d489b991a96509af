"""Random inputs drawn by numpy: jax's generators compile anew for every shape, which is most of a small test."""
import jax.numpy as jnp
import numpy as np


class Draw:
    """Arrays from one seed: `draw = Draw(0); x = draw(2, 7, 16)`."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape: int, dtype="float32") -> jnp.ndarray:
        """Standard normal numbers."""
        return jnp.asarray(self.rng.standard_normal(shape, np.float32)).astype(dtype)

    def uniform(self, *shape: int) -> jnp.ndarray:
        """Numbers in [0, 1)."""
        return jnp.asarray(self.rng.random(shape, np.float32))
