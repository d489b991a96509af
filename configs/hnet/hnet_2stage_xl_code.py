"""H-Net XL with two stages, as released for code: a main network of 28 layers, 1.7 billion parameters.

  python -m experiments.train --config=hnet_2stage_xl_code --workdir=runs/hnet_2stage_xl_code

The recipe is in _official.py, with what to set before you run this. The number of steps is that of English.

Not trained here; the paper (arXiv 2507.07955) trains it on code. 1,654,090,112 parameters.
"""
from configs.hnet._official import PEAK_LR_XL, main_network, outer_stage, paper_run
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return paper_run(
        outer_stage(1024, "m4", "m4", capacity=0.5), outer_stage(1536, "T1m4", "m4T1", capacity=0.5),
        main_network(2048, "T28"), peak_lr=PEAK_LR_XL, tokens_per_chunk=(3.0, 3.0))
