"""SpaceByte-like (arXiv 2404.14408): chunks end with words, on the quick start's corpus.

  python -m experiments.train --config=spacebyte_tiny_stdlib --workdir=runs/spacebyte

Chunks begin by SpaceByte's rule. The paths in and out are H-Net's: a linear residual around the chunks, learned
padding to the wider stage, and every byte reads the output of its chunk. Words of this corpus have 8.2 bytes with
the space before them, because indentation counts as one space.

Measured: 2 CPU cores beside much other work, 8 min 59 s; 2.46 bits per byte on held-out text (one seed, jax
0.10.2, commit 01de057). 529,792 parameters.
"""
from configs.tiny._tiny import attention_stage, byte_stage, tiny_run
from experiments.config import RunConfig
from hnet import HNetConfig


def get_config() -> RunConfig:
    bytes_ = byte_stage("T2", "T2", capacity=0.25, router="space", upsampler="none")
    return tiny_run(HNetConfig(stages=(bytes_, attention_stage(128, "T2"))), tokens_per_chunk=(8.2,))
