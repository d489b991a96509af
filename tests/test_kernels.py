"""Every registered kernel in the interpreter of its hardware, and compiled for chips that are not here.

`make test-tpu-aot` and `make test-cuda-aot` run what needs their compilers.
"""
import jax
import pytest

from tests.support.assertions import assert_matches
from tests.support.gpu_compile import SHARED_MEMORY_BYTES, compile_for_h200, compile_triton_for_h200
from tests.support.kernels import (
    HAS_LIBTPU,
    KERNELS,
    TPU_TOPOLOGIES,
    compile_offline,
    run_in_gpu_interpreter,
    run_in_tpu_interpreter,
)

ON_TPU = [name for name, kernel in KERNELS.items() if kernel.platform == "tpu"]
ON_GPU = [name for name, kernel in KERNELS.items() if kernel.platform == "gpu"]
IN_TRITON = [name for name, kernel in KERNELS.items() if kernel.platform == "triton"]


@pytest.mark.parametrize("name", ON_TPU)
def test_a_kernel_equals_its_spec_in_the_tpu_interpreter_without_races(name):
    kernel = KERNELS[name]
    inputs = kernel.small()
    assert_matches(run_in_tpu_interpreter(kernel, inputs), kernel.expected(inputs), dtype="float32", scale=2)


@pytest.mark.parametrize("name", ON_GPU)
def test_a_kernel_equals_its_spec_in_the_gpu_interpreter_without_races(name):
    kernel = KERNELS[name]
    inputs = kernel.small()
    assert_matches(run_in_gpu_interpreter(kernel, inputs), kernel.expected(inputs), dtype="bfloat16", scale=2)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="no libtpu here: make test-tpu-aot")
@pytest.mark.parametrize("topology", TPU_TOPOLOGIES)
def test_every_tpu_kernel_compiles_for(topology):
    run = compile_offline(topology, ON_TPU)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) == len(ON_TPU)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_GPU)
def test_a_gpu_kernel_compiles_for_an_h200_with_its_sums_in_registers(name):
    kernel = KERNELS[name]
    reports = compile_for_h200(
        lambda inputs: kernel.run(inputs, False), jax.eval_shape(lambda inputs: inputs, kernel.large()))
    assert len(reports) == 3, "the output, dq, and dk with dv"
    for each, report in reports.items():
        print(each, report)  # shown by pytest -s
        assert report.num_wgmma > 0 and report.num_coarse_tanh == 0, (each, report)
        assert report.spill_bytes <= kernel.spill_bytes, (each, report)
        assert report.shared_memory_bytes <= SHARED_MEMORY_BYTES, (each, report)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_TRITON)
def test_a_triton_kernel_compiles_for_an_h200_with_few_numbers_outside_registers(name):
    kernel = KERNELS[name]
    reports = compile_triton_for_h200(
        lambda inputs: kernel.run(inputs, False), jax.eval_shape(lambda inputs: inputs, kernel.large()))
    op = name.split()[0].rstrip(",")
    expected = {f"{op}_forward", f"{op}_backward"}
    if "chunks" in name:
        expected |= {"diagonal_recurrence_summary", "diagonal_recurrence_backward_summary"}
    assert reports.keys() == expected
    for each, report in reports.items():
        print(each, report)  # shown by pytest -s
        assert report.spill_bytes <= kernel.spill_bytes, (each, report)
