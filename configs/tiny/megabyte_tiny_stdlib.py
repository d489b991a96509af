"""MegaByte-like (arXiv 2305.07185): patches of 4 bytes each for any text, on the quick start's corpus.

  python -m experiments.train --config=megabyte_tiny_stdlib --workdir=runs/megabyte

A patch is the mean of its bytes' vectors, where MegaByte concatenates their embeddings; and attention over bytes
reaches back across patches.

Measured: 2 CPU cores beside much other work, 8 min 9 s; 2.50 bits per byte on held-out text (one seed, jax
0.10.2, commit 01de057). 488,704 parameters.
"""
from configs.tiny._tiny import attention_stage, byte_stage, tiny_run
from experiments.config import RunConfig
from hnet import HNetConfig


def get_config() -> RunConfig:
    bytes_ = byte_stage(
        "T1", "T2", capacity=0.3125, router="stride", router_stride=4, downsampler="mean", upsampler="none")
    return tiny_run(HNetConfig(stages=(bytes_, attention_stage(128, "T2"))), tokens_per_chunk=(4.0,))
