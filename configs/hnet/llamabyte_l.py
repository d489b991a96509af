"""LlamaByte-like, the paper's flat Transformer over bytes: 206 million parameters; the paper's has 210.

  python -m experiments.train --config=llamabyte_l --workdir=runs/llamabyte_l

16 layers of width 1024 that see 1024 bytes, and heads of which half is rotated, are our choice. The paper also
has a "global" one: add --config.model.stages.stage0.stack.attention.window=none. Recipe, and what to set before
you run this: _official.py.

Not trained here; the paper (arXiv 2507.07955) trains its own on 100 billion tokens of FineWeb-Edu. 206,078,976
parameters.
"""
from configs.hnet._official import PEAK_LR_L, main_network, paper_run
from experiments.config import RunConfig


def get_config() -> RunConfig:
    return paper_run(
        main_network(1024, "T16", window=1023), peak_lr=PEAK_LR_L, tokens_per_chunk=())
