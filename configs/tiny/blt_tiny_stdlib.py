"""BLT-like (arXiv 2412.09871): patches begin where a small model is unsure of the next byte.

  python -m experiments.train --config=blt_boundary_lm_tiny_stdlib --workdir=runs/lm
  python -m experiments.train --config=blt_tiny_stdlib --workdir=runs/blt --config.boundary_lm_from=runs/lm

The corpus is the quick start's. A patch is the maximum over its bytes' vectors, and every byte reads the output
of its patch, where BLT has cross-attention both ways; BLT also embeds the byte n-grams that end at each byte. At
2.75 nats, patches of held-out text have 4.0 bytes.

Measured: 2 CPU cores beside much other work, 8 min 39 s after the small model's 4 min 23 s; 2.55 bits per byte
on held-out text (one seed, jax 0.10.2, commit 01de057). 603,712 parameters.
"""
from configs.tiny._tiny import attention_stage, blt_boundary_lm, byte_stage, tiny_run
from experiments.config import RunConfig
from hnet import HNetConfig


def get_config() -> RunConfig:
    bytes_ = byte_stage(
        "T1", "T2", capacity=0.5, router="entropy", entropy_threshold=2.75, downsampler="max", upsampler="none")
    return tiny_run(
        HNetConfig(stages=(bytes_, attention_stage(128, "T2")), boundary_lm=blt_boundary_lm()),
        tokens_per_chunk=(4.0,))
