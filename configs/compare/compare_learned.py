"""Chunks cut where the model learned to, 8 bytes aimed at. One of four at equal work per byte: see _compare.py.

  python -m experiments.train --config=compare_learned --workdir=runs/learned
"""
from configs.compare._compare import chunked_config
from experiments.config import RunConfig


def get_config() -> RunConfig:
    # The ratio loss is one pull among others: aimed at 12 bytes, chunks come out about 8 bytes long.
    return chunked_config(router="learned", aim=12.0)
