"""H-Net XL with two stages, as released: 1.6 billion parameters, aims at 3 times 3 bytes per chunk.

  python -m experiments.train --config=hnet_2stage_xl --workdir=runs/hnet_2stage_xl

The recipe, and what to set before you run this, are in _official.py.

Not trained here; the paper (arXiv 2507.07955) trains it on 100 billion tokens of FineWeb-Edu. 1,603,492,224
parameters.
"""
from configs.hnet._official import PEAK_LR_XL, main_network, outer_stage, paper_run
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return paper_run(
        outer_stage(1024, "m4", "m4", capacity=0.5), outer_stage(1536, "T1m4", "m4T1", capacity=0.5),
        main_network(2048, "T27"), peak_lr=PEAK_LR_XL, tokens_per_chunk=(3.0, 3.0))
