"""Settings of every test: eight virtual CPU devices and few compiler optimisations.

The devices let sharded code be tested on any machine. Compiling is most of a test whose programs run once, so only
slow tests have all of XLA's optimisations. A worker that has gathered many programs drops them between two files.
"""
import gc
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)

MEMORY_MAPS = Path("/proc/self/maps")  # of Linux, which allows a process 65,530 and XLA several to each program
MANY_MEMORY_MAPS = 25_000              # one file makes up to 20,000 more; XLA aborts the process at the limit


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    yield
    if MEMORY_MAPS.exists() and MEMORY_MAPS.read_text().count("\n") > MANY_MEMORY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def optimisations(request):
    is_slow = request.node.get_closest_marker("slow") is not None
    jax.config.update("jax_disable_most_optimizations", not is_slow)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
