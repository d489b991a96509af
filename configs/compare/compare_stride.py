"""Chunks of 8 bytes each, whatever the text. One of four at equal work per byte: see _compare.py.

  python -m experiments.train --config=compare_stride --workdir=runs/stride
"""
from configs.compare._compare import chunked_config
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return chunked_config(router="stride", router_stride=8)
