"""Compiles GPU kernels for an H200 on a machine that has none, and reads the assembler's report on them.

Needs jax's CUDA plugin of the same version as jax, without a GPU or its driver, and CUDA's assembler, ptxas:

  pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt
"""
import collections
import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

SHARED_MEMORY_BYTES = 232_448  # that a thread block may have

# What the compiler asks of a device; numbers from NVIDIA's data sheet and programming guide.
H200 = f"""
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
gpu_device_info {{
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {SHARED_MEMORY_BYTES}
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}}
"""


class KernelReport(NamedTuple):
    registers: int
    spill_bytes: int      # stored and loaded
    shared_memory_bytes: int
    num_wgmma: int        # instructions
    num_coarse_tanh: int  # instructions good to 2^-11, which an interpreter computes exactly


def compile_for_h200(function: Callable, *shapes: Any) -> dict[str, KernelReport]:
    """Compiles a function whose kernels are of Mosaic GPU, and reports on each by its name.

    Args:
      shapes: ShapeDtypeStructs, in pytrees.

    Skips the test where jax's CUDA plugin or the assembler is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        with _environment("MOSAIC_GPU_DUMP_TO", folder):
            _compile(function, shapes, {})
        return _reports(Path(folder))


def compile_triton_for_h200(function: Callable, *shapes: Any) -> dict[str, KernelReport]:
    """Compiles a function whose kernels are of Pallas's Triton, as `compile_for_h200` does."""
    with tempfile.TemporaryDirectory() as folder:
        _compile(function, shapes, {
            "xla_dump_to": folder, "xla_dump_emitter_re": ".*", "xla_gpu_dump_llvmir": True})
        reports = {}
        for path in Path(folder).glob("*.ptx"):
            text = path.read_text()
            kernels = re.findall(r"\.entry (\w+_recurrence\w*)", text)  # others are fusions of XLA's
            if kernels:
                (name,) = kernels
                assembled = subprocess.run([_ptxas(), "-arch=sm_90a", "-v", "-o", os.devnull, path],
                                           capture_output=True, text=True, check=True)
                reports[name] = _report(text, assembled.stderr, shared_memory_bytes=0)
        return reports


def _compile(function: Callable, shapes: Any, options: dict[str, Any]) -> None:
    sharding = _h200()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    with use_abstract_mesh(sharding.mesh.abstract_mesh):
        jax.jit(function).lower(*shapes).compile(compiler_options=options)


def _ptxas() -> str:
    found = shutil.which("ptxas")
    if found is not None:
        return found
    return str(Path(importlib.util.find_spec("nvidia.cu13").submodule_search_locations[0]) / "bin" / "ptxas")


@functools.cache
def _h200() -> NamedSharding:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("compiling for a GPU needs jax's CUDA plugin: pip install jax-cuda13-plugin jax-cuda13-pjrt")
    version = importlib.metadata.version("jax-cuda13-plugin")
    if version != jax.__version__:
        pytest.skip(f"jax's CUDA plugin is of version {version}; {jax.__version__} fits")
    if shutil.which("ptxas") is None and importlib.util.find_spec("nvidia.cu13") is None:
        pytest.skip("compiling for a GPU needs ptxas, of CUDA 13 or of pip install nvidia-cuda-nvcc")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H200, topology="1x1x1")
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _reports(folder: Path) -> dict[str, KernelReport]:
    """From files NAME_0.ptx, NAME_0.ptxas and, by another count, NAME_0.resources.txt of each kernel."""
    texts = collections.defaultdict(dict)
    for path in folder.iterdir():
        name, kind = re.fullmatch(r"(.+?)_\d+\.(.+)", path.name).groups()
        if kind in ("ptx", "ptxas", "resources.txt"):
            assert kind not in texts[name], f"two kernels are called {name}"
            texts[name][kind] = path.read_text()

    return {
        name: _report(of["ptx"], of["ptxas"],
                      shared_memory_bytes=_number(r"smem_scratch_bytes=(\d+)", of["resources.txt"]))
        for name, of in texts.items()}


def _report(ptx: str, ptxas: str, *, shared_memory_bytes: int) -> KernelReport:
    return KernelReport(
        registers=_number(r"Used (\d+) registers", ptxas),
        # One line of the assembler's report, of which a warning repeats the numbers.
        spill_bytes=_number(r"frame, (\d+) bytes spill", ptxas)
        + _number(r"frame, .*, (\d+) bytes spill loads", ptxas),
        shared_memory_bytes=shared_memory_bytes, num_wgmma=ptx.count("wgmma.mma_async"),
        num_coarse_tanh=ptx.count("tanh.approx"))


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text).group(1))
