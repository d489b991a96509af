"""The sharded train step compiles for real TPU topologies, without a TPU. `make test-tpu-aot` runs this."""
import json
import os
import subprocess
import sys

import pytest

from tests.support.kernels import HAS_LIBTPU, OFFLINE, ROOT

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from experiments.config import RunConfig
from experiments.config.files import load_config
from experiments.training.mesh import batch_sharding, make_mesh, use_mesh
from experiments.training.step import compile_program

topology, dtype = sys.argv[1:]
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
config = load_config("hnet2_tiny_stdlib", [f"--config.model.dtype={dtype}"], RunConfig)
mesh = make_mesh(2, list(devices))
with use_mesh(mesh):
    program = compile_program(config, mesh)
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    compiled = program.step.lower(program.abstract_state, {"tokens": tokens, "segment_ids": tokens}).compile()
(state, _), _ = compiled.input_shardings
kernel = state.params["stage0"]["stage1"]["encoder"]["run0"]["feed_forward"]["out"]["kernel"]
memory = compiled.memory_analysis()
print(json.dumps({"temporary_bytes": memory.temp_size_in_bytes, "argument_bytes": memory.argument_size_in_bytes,
                  "devices": len(kernel.device_set), "is_replicated": kernel.is_fully_replicated}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="no libtpu here: make test-tpu-aot")
@pytest.mark.parametrize(("topology", "dtype"), [
    ("v5e:2x2", "float32"), ("v5e:2x2", "bfloat16"), ("v6e:2x2", "bfloat16"), ("v5p:2x2x1", "float32")])
def test_the_sharded_train_step_compiles_for(topology, dtype):
    run = subprocess.run([sys.executable, "-c", PROGRAM, topology, dtype], capture_output=True, text=True,
                         cwd=ROOT, env=os.environ | OFFLINE)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["devices"] == 4 and not report["is_replicated"], "the model axis must split this kernel"
    assert 0 < report["argument_bytes"] and 0 < report["temporary_bytes"] < 2**30
