"""Chunks that begin where a word ended. One of four at equal work per byte: see _compare.py.

  python -m experiments.train --config=compare_space --workdir=runs/space
"""
from configs.compare._compare import chunked_config
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return chunked_config(router="space")
