"""Every registered kernel in the TPU interpreter, and compiled for real chips (`make test-tpu-aot`)."""

import pytest

from tests.assertions import assert_matches
from tests.kernels import HAS_LIBTPU, KERNELS, TPU_TOPOLOGIES, compile_offline, run_in_tpu_interpreter


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_equals_its_spec_in_the_tpu_interpreter_without_races(name):
    kernel = KERNELS[name]
    inputs = kernel.small()
    assert_matches(run_in_tpu_interpreter(kernel, inputs), kernel.expected(inputs), dtype="float32", scale=2)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="no libtpu here: make test-tpu-aot")
@pytest.mark.parametrize("topology", TPU_TOPOLOGIES)
def test_every_kernel_compiles_for(topology):
    run = compile_offline(topology, list(KERNELS))
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) == len(KERNELS)
