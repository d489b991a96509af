"""Chunks that begin where a word ended. One of four at equal work per byte: see _compare.py.

  python -m experiments.train --config=compare_space --workdir=runs/space

Measured: 1 CPU device beside other work, 617 s of train steps; 2.250 ± 0.010 bits per byte on held-out text
(three seeds, jax 0.10.2, commits 60a8992 and 7570878). 813,464 parameters.
"""
from configs.compare._compare import chunked_config
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return chunked_config(router="space")
