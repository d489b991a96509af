"""Random inputs drawn by numpy: jax's generators compile for every shape, which would dominate a small test."""
import jax.numpy as jnp
import numpy as np


class Draw:
    """A source of arrays with one seed: `draw = Draw(0); x = draw(2, 7, 16)`."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape: int, dtype="float32") -> jnp.ndarray:
        """Draws standard normal numbers."""
        return jnp.asarray(self.rng.standard_normal(shape, np.float32)).astype(dtype)

    def uniform(self, *shape: int) -> jnp.ndarray:
        """Draws numbers in [0, 1)."""
        return jnp.asarray(self.rng.random(shape, np.float32))
