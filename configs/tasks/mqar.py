"""Recall of 4 to 64 pairs in training and 4 to 256 in tests, as zoology measures it. For a GPU.

  python -m experiments.tasks --config=mqar --outdir=runs/mqar

The mixture of lengths and pairs, its 5.8 million sequences in batches of 256, and the four rates are those of
github.com/HazyResearch/zoology; there 180 000 sequences are seen 32 times, here every one is new. In the plot of
the paper (arXiv 2312.04927) each number of pairs has a model of its own:

  --config.data.one_model=false --config.data.train_shares='(1.,1.,1.,1.)'
  --config.data.train_lengths='(64,128,256,512)' --config.data.train_pairs='(4,8,16,64)'
  --config.data.test_lengths='(64,128,256,512)' --config.data.test_pairs='(4,8,16,64)'
  --config.learning_rates='(1e-4,5e-4,2e-3,1e-2)'

Not measured here: it has not been run.
"""
from configs.tasks._shared import RECURRENT
from experiments.tasks.config import MQARConfig, TaskConfig
from hnet import AttentionConfig, RecurrenceConfig, StackConfig


def get_config() -> TaskConfig:
    stack = StackConfig(
        width=128, attention=AttentionConfig(num_heads=2, rotary_width=32),
        recurrence=RecurrenceConfig(state_size=64), feed_forward_width=256)
    return TaskConfig(
        data=MQARConfig(), stack=stack, mixers=("t", *RECURRENT), learning_rates=(1e-3, 3.2e-3, 1e-2, 3.2e-2),
        num_steps=22_500, batch_size=256, test_batch_size=50,
    )
