"""AU-Net-like (arXiv 2506.14761): words, pairs of words, and fours of words, on the quick start's corpus.

  python -m experiments.train --config=aunet_tiny_stdlib --workdir=runs/aunet

A word is represented by the vector of the byte after it, which has seen the whole word; words are found by
SpaceByte's rule. Every byte reads the output of its chunk, where AU-Net has a separate map for each place in a
chunk.

Measured: 2 CPU cores beside much other work, 8 min 9 s; 2.66 bits per byte on held-out text (one seed, jax
0.10.2, commit 01de057). 564,192 parameters.
"""
from configs.tiny._tiny import attention_stage, byte_stage, tiny_run
from experiments.config import RunConfig
from hnet import HNetConfig


def get_config() -> RunConfig:
    # Within a row of words there are few slots to save: pairs have one for each word.
    pairs = dict(router="stride", router_stride=2, upsampler="none")
    return tiny_run(
        HNetConfig(stages=(
            byte_stage("T1", "T1", capacity=0.25, router="space", upsampler="none"),
            attention_stage(64, "T1", "T1", **pairs),
            attention_stage(96, "T1", "T1", **pairs),
            attention_stage(128, "T1"))),
        tokens_per_chunk=(8.2, 2.0, 2.0))
