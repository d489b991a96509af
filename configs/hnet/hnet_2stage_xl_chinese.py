"""H-Net XL with two stages, as released for Chinese: a main network of 30 layers, 1.8 billion parameters.

  python -m experiments.train --config=hnet_2stage_xl_chinese --workdir=runs/hnet_2stage_xl_chinese

The recipe is in _official.py, with what to set before you run this. The number of steps is that of English.

Not trained here; the paper (arXiv 2507.07955) trains it on 46 billion tokens of Chinese. 1,755,285,888
parameters.
"""
from configs.hnet._official import PEAK_LR_XL, main_network, outer_stage, paper_run
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return paper_run(
        outer_stage(1024, "m4", "m4", capacity=0.5), outer_stage(1536, "T1m4", "m4T1", capacity=0.5),
        main_network(2048, "T30"), peak_lr=PEAK_LR_XL, tokens_per_chunk=(3.0, 3.0))
