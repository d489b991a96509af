"""H-Net XL with one stage, as released: 1.3 billion parameters, aims at 6 bytes per chunk.

  python -m experiments.train --config=hnet_1stage_xl --workdir=runs/hnet_1stage_xl

The recipe, and what to set before you run this, are in _official.py.

Not trained here; the paper (arXiv 2507.07955) trains it on 100 billion tokens of FineWeb-Edu. 1,270,833,920
parameters.
"""
from configs.hnet._official import PEAK_LR_XL, main_network, outer_stage, paper_run
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return paper_run(
        outer_stage(1024, "m4", "m4", capacity=0.3125), main_network(2048, "T24"),
        peak_lr=PEAK_LR_XL, tokens_per_chunk=(6.0,))
