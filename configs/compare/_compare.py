"""Common settings of the configs compare_*, which differ only in where chunks begin, and whether there are any.

For one seed all four read the same batches in the same order, with the same optimiser and number of steps. The
three that chunk are one network, an outer m2 + m2 around an inner T4, and aim at the same length of chunks: 8
bytes, the length of words with the space before them in this corpus (8.2 on held-out text: the indentation of a
line counts as one space), which no setting changes. The fourth does its inner work on bytes, in narrower layers.
"""
from experiments.config import DataConfig, OptimizerConfig, RunConfig
from hnet import AttentionConfig, ChunkingConfig, HNetConfig, RecurrenceConfig, StackConfig, StageConfig

RECURRENCE = RecurrenceConfig(state_size=32, chunk_size=32)


def chunked_config(*, router: str, aim: float = 11.0, **router_fields) -> RunConfig:
    """A one-stage H-Net with this router; no boundary is ever demoted. `aim` is for one that learns."""
    stages = (
        StageConfig(
            encoder="m2", decoder="m2", stack=StackConfig(width=64, recurrence=RECURRENCE),
            chunking=ChunkingConfig(
                router=router, **router_fields, capacity=0.25, grow_to=(0.5, 1.0), overflow="grow")),
        StageConfig(encoder="T4", stack=StackConfig(
            width=128, attention=AttentionConfig(num_heads=4, rotary_width=16), feed_forward_width=256)),
    )
    objective = "hnet" if router == "learned" else "none"
    return run_config(*stages, tokens_per_chunk=(aim,), ratio_objective=objective)


def run_config(*stages: StageConfig, **fields) -> RunConfig:
    return RunConfig(
        model=HNetConfig(stages=stages),
        data=DataConfig(source="stdlib", sequence_length=256, batch_size=16),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=20),
        num_steps=300, log_every=20, eval_every=50, eval_bytes=65_536, checkpoint_every=150, keep_checkpoints=1,
        report=False,
        **fields,
    )
