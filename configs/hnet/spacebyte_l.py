"""SpaceByte-like (arXiv 2404.14408): chunks end with words. 557 million parameters; the H-Net paper's has 570.

  python -m experiments.train --config=spacebyte_l --workdir=runs/spacebyte_l

Chunks begin by SpaceByte's rule. The paths in and out are H-Net's: a linear residual around the chunks, learned
padding to the wider stage, and every byte reads the output of its chunk. The layers and their widths are our
choice; 6 bytes per word is what the H-Net paper measured on FineWeb-Edu, not a setting. Recipe, and what to set
before you run this: _official.py.

Not trained here; the paper (arXiv 2507.07955) trains its own on 100 billion tokens of FineWeb-Edu. 557,388,800
parameters.
"""
from configs.hnet._official import PEAK_LR_L, main_network, outer_stage, paper_run
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return paper_run(
        outer_stage(1024, "T4", "T4", router="space", upsampler="none", capacity=0.25),
        main_network(1536, "T16"), peak_lr=PEAK_LR_L, tokens_per_chunk=(6.0,), ratio_objective="none")
