"""The paper's H-Net (pool), about: H-Net L with 6 bytes in each chunk of any text. 847 million parameters.

  python -m experiments.train --config=hnet_pool_l --workdir=runs/hnet_pool_l

28 inner layers are our choice, close to the paper's 850 million parameters. A fixed width has probability 1, so
nothing is smoothed; documents begin with a chunk, hence slots for a few more. Recipe, and what to set before you
run this: _official.py.

Not trained here; the paper (arXiv 2507.07955) trains its own of 850 million on 100 billion tokens of FineWeb-Edu.
847,195,904 parameters.
"""
from configs.hnet._official import PEAK_LR_L, main_network, outer_stage, paper_run
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return paper_run(
        outer_stage(1024, "m4", "m4", router="stride", router_stride=6, upsampler="none", capacity=0.1875),
        main_network(1536, "T28"), peak_lr=PEAK_LR_L, tokens_per_chunk=(6.0,), ratio_objective="none")
