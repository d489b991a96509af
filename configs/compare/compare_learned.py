"""Chunks cut where the model learned to, aiming at 8 bytes. One of four at equal work per byte: see _compare.py.

  python -m experiments.train --config=compare_learned --workdir=runs/learned

Measured: 1 CPU device beside other work, 238 s of train steps; 2.316 ± 0.019 bits per byte on held-out text
(three seeds, jax 0.10.2, commits 60a8992 and 7570878). 821,656 parameters.
"""
from configs.compare._compare import chunked_config
from experiments.config import RunConfig


def get_config() -> RunConfig:
    # The ratio loss is one pull among others: aimed at 12 bytes, chunks come out about 8 bytes long.
    return chunked_config(router="learned", aim=12.0)
