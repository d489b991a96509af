"""MambaByte-like, the paper's flat state-space model over bytes: 185 million parameters; the paper's has 190.

  python -m experiments.train --config=mambabyte_l --workdir=runs/mambabyte_l

28 layers of Mamba-2 at width 1024 are our choice. Recipe, and what to set before you run this: _official.py.

Not trained here; the paper (arXiv 2507.07955) trains its own on 100 billion tokens of FineWeb-Edu. 185,354,880
parameters.
"""
from configs.hnet._official import PEAK_LR_L, main_network, paper_run
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return paper_run(
        main_network(1024, "m28"), peak_lr=PEAK_LR_L, tokens_per_chunk=())
