"""What every test runs with: eight virtual CPU devices, so that sharded code is tested on any machine, and few of
XLA's optimisations, as most of a test is to compile what runs once. Slow tests have all of them.
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
