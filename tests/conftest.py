"""Settings of every test: eight virtual CPU devices and few compiler optimisations.

The devices let sharded code be tested on any machine. Compiling is most of a test whose programs run once, so only
slow tests have all of XLA's optimisations.
"""
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def optimisations(request):
    is_slow = request.node.get_closest_marker("slow") is not None
    jax.config.update("jax_disable_most_optimizations", not is_slow)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
