"""The small byte model whose uncertainty cuts the text of blt_tiny_stdlib; train it first.

  python -m experiments.train --config=blt_boundary_lm_tiny_stdlib --workdir=runs/lm

Measured: 2 CPU cores beside much other work, 4 min 23 s; 2.76 bits per byte on held-out text (one seed, jax
0.10.2, commit 01de057). 115,008 parameters.
"""
from configs.tiny._tiny import blt_boundary_lm, tiny_run
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return tiny_run(blt_boundary_lm(), tokens_per_chunk=())
