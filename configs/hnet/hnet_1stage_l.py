"""H-Net L with one stage, as released: 680 million parameters, aims at 6 bytes per chunk.

  python -m experiments.train --config=hnet_1stage_l --workdir=runs/hnet_1stage_l

The recipe, and what to set before you run this, are in _official.py.

Not trained here; the paper (arXiv 2507.07955) trains it on 100 billion tokens of FineWeb-Edu. 679,405,312
parameters.
"""
from configs.hnet._official import PEAK_LR_L, main_network, outer_stage, paper_run
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return paper_run(
        outer_stage(1024, "m4", "m4", capacity=0.3125), main_network(1536, "T22"),
        peak_lr=PEAK_LR_L, tokens_per_chunk=(6.0,))
