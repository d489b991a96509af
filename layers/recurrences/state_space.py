"""Diagonal state spaces h' = lambda h + u: discretised to h_t = a h_{t-1} + gain u_t, and HiPPO's lambda."""
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Discretization = Literal["zoh", "bilinear"]


def discretize(
    eigenvalues: jax.Array, step: jax.Array, method: Discretization = "zoh"
) -> tuple[jax.Array, jax.Array]:
    """Returns a and gain for complex eigenvalues whose real part is below 0.

    Args:
      step: > 0, time per token.
      method: "zoh" holds each input for a step: a = exp(lambda step), gain = (a - 1) / lambda; "bilinear" is the
        trapezoidal rule.
    """
    scaled = eigenvalues * step
    if method == "zoh":
        return jnp.exp(scaled), _complex_expm1(scaled) / eigenvalues
    implicit = 1 / (1 - scaled / 2)
    return implicit * (1 + scaled / 2), implicit * step


def _complex_expm1(z: jax.Array) -> jax.Array:
    """Returns exp(z) - 1, whose parts keep their digits for small z."""
    x, y = jnp.real(z), jnp.imag(z)
    return jax.lax.complex(jnp.expm1(x) * jnp.cos(y) - 2 * jnp.sin(y / 2) ** 2, jnp.exp(x) * jnp.sin(y))


def hippo_legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns eigenvalues [size] and eigenvectors [size, size], in columns, of the normal part of HiPPO-LegS.

    S4D (arXiv 2206.11893) section 2.3; complex128. They come in conjugate pairs, sorted by imaginary part.
    """
    index = np.arange(size)
    root = np.sqrt(2 * index + 1.0)
    legs = -(np.tril(np.outer(root, root)) - np.diag(index))
    normal = legs + np.outer(root, root) / 2  # skew-symmetric but for its diagonal, all -1/2
    imaginary, vectors = np.linalg.eigh(-1j * normal)
    return np.mean(np.diag(normal)) + 1j * imaginary, vectors
