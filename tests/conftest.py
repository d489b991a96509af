"""What every test runs with: eight virtual CPU devices, so that sharded code is tested on any machine, and few of
XLA's optimisations, as most of a test is to compile what runs once. Slow or `optimised` tests have all of them.
"""
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def optimisations(request):
    if any(request.node.get_closest_marker(name) for name in ("slow", "optimised")):
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)
    else:
        yield
