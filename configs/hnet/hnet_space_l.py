"""The paper's H-Net (space), about: H-Net L whose chunks end with words, by rule. 847 million parameters.

  python -m experiments.train --config=hnet_space_l --workdir=runs/hnet_space_l

28 inner layers are our choice, close to the paper's 850 million parameters. A rule has probability 1, so nothing
is smoothed. 6 bytes per word is what the paper measured on FineWeb-Edu, not a setting. Recipe, and what to set
before you run this: _official.py.

Not trained here; the paper (arXiv 2507.07955) trains its own of 850 million on 100 billion tokens of FineWeb-Edu.
847,195,904 parameters.
"""
from configs.hnet._official import PEAK_LR_L, main_network, outer_stage, paper_run
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return paper_run(
        outer_stage(1024, "m4", "m4", router="space", upsampler="none", capacity=0.25),
        main_network(1536, "T28"), peak_lr=PEAK_LR_L, tokens_per_chunk=(6.0,), ratio_objective="none")
