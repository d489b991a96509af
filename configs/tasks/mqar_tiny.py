"""Recall of 4, 8 and 16 pairs in 64 tokens: distinguishes mixers on one CPU.

  python -m experiments.tasks --config=mqar_tiny --outdir=runs/mqar_tiny

Empty slots are blank: in so small a vocabulary, random tokens would often be keys.

Measured: 2 CPU cores beside other work, 8 min 18 s for 11 mixers; right answers on 16 pairs from 4.1 % (rwkv) to
100.0 % (kda) (one seed, jax 0.10.2, commit ea78625; all of them in docs/tasks.md).
"""
from configs.tasks._shared import RECURRENT
from experiments.tasks.config import MQARConfig, TaskConfig
from hnet import AttentionConfig, RecurrenceConfig, StackConfig


def get_config() -> TaskConfig:
    lengths, pairs = (64, 64, 64), (4, 8, 16)
    data = MQARConfig(
        vocab_size=48, train_lengths=lengths, train_pairs=pairs, train_shares=(1.0, 1.0, 1.0),
        test_lengths=lengths, test_pairs=pairs, random_non_queries=False)
    stack = StackConfig(
        width=64, attention=AttentionConfig(num_heads=2, rotary_width=16),
        recurrence=RecurrenceConfig(state_size=8, expand=1, head_width=32), feed_forward_width=128)
    return TaskConfig(
        data=data, stack=stack, mixers=("t", *RECURRENT), learning_rates=(5e-3,), schedule="wsd",
        num_steps=600, batch_size=32,
    )
