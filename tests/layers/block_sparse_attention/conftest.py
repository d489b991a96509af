"""Most of these tests is compiling what runs once: with few of XLA's optimisations that takes half as long."""
import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def few_optimisations():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
