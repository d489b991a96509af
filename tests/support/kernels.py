"""Checks of Pallas kernels without their hardware; one entry in KERNELS gives a kernel all of them.

  interpreted on CPU         with the other implementations, in the test matrix of its op (TPU, Triton)
  TPU interpreter            semaphores, memory spaces, blocks out of range and races between cores, as on a chip
  GPU interpreter            warpgroups, barriers, copies and races, as on a Hopper GPU (jax 0.11 or newer)
  compiled ahead of time     for four TPUs, with their limits of vector and scalar memory (needs libtpu), or for an
                             H200: matmuls in wgmma, no spilled registers, shared memory (gpu_compile.py)

Kernels in Triton have no interpreter of their own: they are in the test matrix of their op, and compiled.

Paths into jax that are not public are all here.
"""
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from layers import diagonal_recurrence, dplr_recurrence, gated_delta_rule, gated_linear_attention
from tests.support.block_sparse_cases import Case, draw_inputs, in_float32, values_and_gradients
from tests.support.inputs import Draw

TPU_TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
OFFLINE = {  # the compiler neither looks for a TPU nor refuses a second user of its library
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
ROOT = Path(__file__).resolve().parents[2]


class Kernel(NamedTuple):
    """A kernel, with inputs for an interpreter and for a compiler.

    Attributes:
      platform: "tpu", "gpu" for Mosaic GPU, or "triton".
      run: called with inputs and `interpret`; returns arrays, from the kernel and its gradient.
      expected: the same arrays, from inputs by the spec.
      small: makes inputs that an interpreter runs in seconds.
      large: makes inputs of a size that is trained on, of which the compiler sees the shapes.
      spill_bytes: stored and loaded, that a GPU kernel may have.
    """

    platform: str
    run: Callable[[Any, Any], Any]
    expected: Callable[[Any], Any]
    small: Callable[[], Any]
    large: Callable[[], Any]
    spill_bytes: int = 0


def _block_sparse(platform: str, small: Case, large: Case, **keywords: Any) -> Kernel:
    def run(inputs, interpret):
        return values_and_gradients(inputs, implementation=f"pallas_{platform}", interpret=interpret)[:2]

    def expected(inputs):
        return values_and_gradients(in_float32(inputs), implementation="reference")[:2]

    return Kernel(platform, run, expected, lambda: draw_inputs(small), lambda: draw_inputs(large), **keywords)


_SMALL = dict(b=1, t=256, s=256, heads=2, key_heads=1, width=64, value_width=32, block_q=128, block_k=128)
_LARGE = dict(b=2, t=4096, s=4096, heads=8, key_heads=2, width=128, value_width=128, block_q=512, block_k=512,
              dtype="bfloat16")
KERNELS = {
    "block_sparse_attention": _block_sparse(
        "tpu", Case(lists=1, **_SMALL), Case(**_LARGE)),
    "block_sparse_attention with everything": _block_sparse(
        "tpu", Case(lists=2, select=True, segments=True, window=100, softcap=5.0, **_SMALL),
        Case(lists=8, select=True, segments=True, window=1000, softcap=30.0, **_LARGE)),
    "block_sparse_attention float32, width 96": _block_sparse(
        "tpu", Case(lists=1, causal=False, **_SMALL | dict(t=200, width=32)),
        Case(segments=True, **_LARGE | dict(width=96, value_width=64, block_q=256, dtype="float32"))),
    "block_sparse_attention width 64, blocks of 128": _block_sparse(
        "tpu", Case(lists=1, offset=128, **_SMALL | dict(t=128)),
        Case(**_LARGE | dict(width=64, value_width=64, block_q=128, block_k=128))),
    "block_sparse_attention width 256, blocks of 1024": _block_sparse(
        "tpu", Case(lists=1, **_SMALL | dict(b=2, s=128, t=128)),
        Case(**_LARGE | dict(width=256, value_width=192, block_q=512, block_k=1024))),
}


_GPU_SMALL = dict(b=1, t=200, s=256, heads=2, key_heads=1, width=64, value_width=64, block_q=128, block_k=64,
                  dtype="bfloat16")
_GPU_LARGE = dict(b=1, t=2048, s=2048, heads=8, key_heads=2, width=128, value_width=128, block_q=128, block_k=128,
                  dtype="bfloat16")
KERNELS |= {
    "block_sparse_attention on Hopper": _block_sparse(
        "gpu", Case(lists=1, segments=True, offset=56, **_GPU_SMALL | dict(block_k=128)), Case(**_GPU_LARGE)),
    "block_sparse_attention on Hopper with everything": _block_sparse(
        "gpu", Case(lists=1, select=True, window=100, softcap=5.0, **_GPU_SMALL),
        Case(select=True, segments=True, window=1000, softcap=30.0, **_GPU_LARGE)),
    "block_sparse_attention on Hopper, blocks of 64": _block_sparse(
        "gpu", Case(lists=2, **_GPU_SMALL | dict(t=128)), Case(**_GPU_LARGE | dict(block_k=64))),
    "block_sparse_attention on Hopper, width 64": _block_sparse(
        "gpu", Case(lists=1, **_GPU_SMALL | dict(t=128, s=128)),
        Case(**_GPU_LARGE | dict(width=64, value_width=64))),
    "block_sparse_attention on Hopper, width 192": _block_sparse(
        "gpu", Case(lists=1, **_GPU_SMALL | dict(width=96, t=128)),
        Case(**_GPU_LARGE | dict(width=192, block_k=64))),
    "block_sparse_attention on Hopper, width 256": _block_sparse(
        "gpu", Case(lists=1, **_GPU_SMALL | dict(value_width=128, t=128)),
        # A few numbers that dq keeps in memory, outside its matmuls.
        Case(**_GPU_LARGE | dict(width=256, value_width=256, block_k=64)), spill_bytes=64),
}


class DiagonalCase(NamedTuple):
    """Inputs of the diagonal recurrence, with a log gate if they are real; documents and padding if asked for."""

    b: int
    t: int
    d: int
    dtype: str = "float32"
    reverse: bool = False
    segments: bool = False

    def draw(self) -> dict[str, jax.Array]:
        draw, shape = Draw(0), (self.b, self.t, self.d)
        numbers = draw
        if self.dtype == "complex64":
            def numbers(*shape, dtype="complex64"):
                return draw(*shape) + 1j * draw(*shape)
        state = "complex64" if self.dtype == "complex64" else "float32"
        inputs = dict(x=numbers(*shape, dtype=self.dtype), initial_state=numbers(self.b, self.d, dtype=state),
                      dy=numbers(*shape, dtype=self.dtype), d_last=numbers(self.b, self.d, dtype=state))
        inputs |= (dict(a=0.9 * jnp.exp(1j * draw(*shape))) if self.dtype == "complex64"
                   else dict(log_a=-jnp.abs(draw(*shape, dtype=self.dtype))))
        if self.segments:
            ids = np.repeat([[1, 1, 2, 0, 3, 4, 4]], -(-self.t // 7), axis=1)[:, : self.t]
            inputs["segment_ids"] = jnp.asarray(np.broadcast_to(ids, shape[:2]), jnp.int32)
        return inputs


def _diagonal(platform: str, small: DiagonalCase, large: DiagonalCase, **keywords: Any) -> Kernel:
    def run(implementation, inputs, interpret):
        others = dict(inputs)
        ids, dy, d_last = others.pop("segment_ids", None), others.pop("dy"), others.pop("d_last")
        results, pull_back = jax.vjp(lambda arrays: diagonal_recurrence(
            arrays["x"], a=arrays.get("a"), log_a=arrays.get("log_a"), initial_state=arrays["initial_state"],
            segment_ids=ids, reverse=small.reverse, implementation=implementation, interpret=interpret), others)
        return jax.tree.map(lambda z: (jnp.real(z), jnp.imag(z)), (results, pull_back((dy, d_last))))

    kernel = {"tpu": "pallas_tpu", "triton": "pallas_gpu"}[platform]
    return Kernel(platform, lambda inputs, interpret: run(kernel, inputs, interpret),
                  lambda inputs: run("reference", inputs, False), small.draw, large.draw, **keywords)


KERNELS |= {
    "diagonal_recurrence": _diagonal("tpu", DiagonalCase(1, 128, 128), DiagonalCase(2, 4096, 1024, "bfloat16")),
    "diagonal_recurrence complex, reversed, with documents and a tail": _diagonal(
        "tpu", DiagonalCase(1, 20, 5, "complex64", reverse=True, segments=True),
        DiagonalCase(2, 1000, 600, "complex64", reverse=True, segments=True)),
    "diagonal_recurrence in Triton": _diagonal(
        "triton", DiagonalCase(1, 8, 5), DiagonalCase(8, 4096, 2048, "bfloat16")),
    "diagonal_recurrence in Triton, reversed, with documents, in chunks": _diagonal(
        "triton", DiagonalCase(1, 8, 5, reverse=True, segments=True),
        DiagonalCase(2, 1000, 600, "float32", reverse=True, segments=True)),
    "diagonal_recurrence in Triton, complex": _diagonal(
        "triton", DiagonalCase(1, 8, 5, "complex64"), DiagonalCase(8, 4096, 2048, "complex64")),
}


class MatrixCase(NamedTuple):
    """Inputs of a matrix recurrence: the gated delta rule, without beta linear attention, or RWKV-7 (`rule`)."""

    rule: str
    decay_per_channel: bool = False
    b: int = 1
    t: int = 40
    key_heads: int = 1         # each shared by equally many value heads
    heads: int = 2
    width: int = 8
    value_width: int = 12
    dtype: str = "float32"

    def draw(self) -> dict[str, jax.Array]:
        draw, shape = Draw(0), (self.b, self.t, self.heads)
        key_heads = self.heads if self.rule == "rwkv7" else self.key_heads
        keys = draw(self.b, self.t, key_heads, self.width)
        keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
        decay = -3 * jnp.abs(draw(*shape, self.width) if self.decay_per_channel else draw(*shape))
        inputs = dict(q=draw(*keys.shape, dtype=self.dtype), k=keys.astype(self.dtype),
                      v=draw(*shape, self.value_width, dtype=self.dtype), decay=decay,
                      initial_state=draw(self.b, self.heads, self.width, self.value_width))
        if self.rule != "attention":
            inputs["beta"] = jax.nn.sigmoid(draw(*shape))
        return inputs


def _matrix(platform: str, small: MatrixCase, large: MatrixCase, **keywords: Any) -> Kernel:
    def recur(inputs, **keywords):
        q, k, v, decay = (inputs[name] for name in ("q", "k", "v", "decay"))
        keywords["initial_state"] = inputs["initial_state"]
        if small.rule == "attention":
            return gated_linear_attention(q, k, v, decay, **keywords)
        if small.rule == "delta":
            return gated_delta_rule(q, k, v, inputs["beta"], decay, **keywords)
        return dplr_recurrence(q, decay, k, v, -k, k * inputs["beta"][..., None], **keywords)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def run(inputs, implementation, interpret):
        results, pull_back = jax.vjp(
            functools.partial(recur, implementation=implementation, interpret=interpret), inputs)
        return results, pull_back(results)

    kernel = {"tpu": "pallas_tpu", "triton": "pallas_gpu"}[platform]
    return Kernel(platform, lambda inputs, interpret: run(inputs, kernel, interpret),
                  lambda inputs: run(inputs, "reference", False), small.draw, large.draw, **keywords)


_WIDE = dict(b=2, t=4096, key_heads=8, heads=8, width=128, value_width=128, dtype="bfloat16")
_NARROW = dict(b=2, t=1000, key_heads=2, heads=8, width=64, value_width=64)
KERNELS |= {
    "matrix_recurrence, decays of heads": _matrix(
        "tpu", MatrixCase("attention", t=70, heads=1), MatrixCase("attention", **_WIDE)),
    "matrix_recurrence, decays of channels": _matrix(
        "tpu", MatrixCase("rwkv7", True, t=10, heads=1), MatrixCase("rwkv7", True, **_WIDE)),
    "matrix_recurrence, a delta rule with shared keys": _matrix(
        "tpu", MatrixCase("delta", t=10), MatrixCase("delta", **_NARROW)),
    "matrix_recurrence in Triton, decays of heads": _matrix(
        "triton", MatrixCase("attention"), MatrixCase("attention", **_WIDE), spill_bytes=16_000),
    "matrix_recurrence in Triton, a delta rule with shared keys": _matrix(
        "triton", MatrixCase("delta"), MatrixCase("delta", **_NARROW), spill_bytes=16_000),
}


def run_in_gpu_interpreter(kernel: Kernel, inputs: Any) -> Any:
    """Runs with races detected; skips where jax has no such interpreter."""
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} has no GPU interpreter; 0.11 has")
    return kernel.run(inputs, plgpu.InterpretGPUParams(detect_races=True))


def run_in_tpu_interpreter(kernel: Kernel, inputs: Any) -> Any:
    """Runs with races detected; on jax below 0.12 one raises nothing, but sets a flag."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    try:
        results = jax.block_until_ready(kernel.run(inputs, pltpu.InterpretParams(detect_races=True)))
    except Exception:
        pltpu.reset_tpu_interpret_mode_state()
        raise
    assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found, "a race"
    return results


def compile_for_tpu(kernel: Kernel, topology: str) -> jax.stages.Compiled:
    """Compiles for one chip of `topology`; in a process with OFFLINE in its environment from the start."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    whole = NamedSharding(mesh, PartitionSpec())
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
                          jax.eval_shape(lambda inputs: inputs, kernel.large()))
    with use_abstract_mesh(mesh.abstract_mesh):  # kernels may ask which chip they are lowered for
        lowered = jax.jit(lambda inputs: kernel.run(inputs, False)).lower(inputs)
    assert "tpu_custom_call" in lowered.as_text(), "no kernel in the program"
    return lowered.compile()


def compile_offline(topology: str, names: list[str]) -> subprocess.CompletedProcess:
    """Compiles the named kernels in a process of their own, which prints a line for each."""
    return subprocess.run([sys.executable, "-m", "tests.support.kernels", topology, *names],
                          capture_output=True, text=True, cwd=ROOT, env=os.environ | OFFLINE)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        compiled = compile_for_tpu(KERNELS[name], sys.argv[1])
        print(f"{name}: {compiled.memory_analysis().temp_size_in_bytes} temporary bytes", flush=True)
