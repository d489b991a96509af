"""State tracking in grammars of 20 to 40 symbols: the four experiments of SelectivBench, small scale. For a GPU.

  python -m experiments.tasks --config=selectivbench --outdir=runs/selectivbench

Sizes, steps and rates are those of the paper (arXiv 2601.12598), without its dropout of 0.2. There as here,
attention comes with feed-forward networks and the other mixers without. The longest test has 20 200 steps:
attention that stores its scores needs 3.3 GB for each sequence there.

Not measured here: it has not been run.
"""
from configs.tasks._shared import RECURRENT
from experiments.tasks.config import SelectivBenchConfig, TaskConfig
from hnet import AttentionConfig, RecurrenceConfig, StackConfig


def get_config() -> TaskConfig:
    stack = StackConfig(
        width=256, attention=AttentionConfig(num_heads=2, rotary_width=64),
        recurrence=RecurrenceConfig(head_width=128), feed_forward_width=512)
    return TaskConfig(
        data=SelectivBenchConfig(), stack=stack, mixers=("T", *RECURRENT), learning_rates=(5e-4, 1e-3, 2e-3),
        num_layers=8, conv_taps=0, num_steps=3125, steps_per_call=25, warmup_fraction=0.15, weight_decay=0.0,
        test_batch_size=4,
    )
