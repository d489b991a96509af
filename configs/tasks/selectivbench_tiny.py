"""State tracking in a grammar of 25 states, with gaps and noise, tested also with gaps longer than in training.

  python -m experiments.tasks --config=selectivbench_tiny --outdir=runs/selectivbench_tiny

Each mixer is trained once; with --config.data.kinds="('complexity','gaps','distractors')" on each of these.

Measured: 2 CPU cores beside other work, 9 min 1 s for 11 mixers; right answers with gaps as in training from 80.8
% (ssm) to 97.2 % (kda) (one seed, jax 0.10.2, commit ea78625; all of them in docs/tasks.md).
"""
from configs.tasks._shared import RECURRENT
from experiments.tasks.config import SelectivBenchConfig, TaskConfig
from hnet import AttentionConfig, RecurrenceConfig, StackConfig


def get_config() -> TaskConfig:
    data = SelectivBenchConfig(
        kinds=("gaps", "generalisation"), alphabets=(6,), depth=4, num_shown=24, gaps=(1, 3),
        first_distractor=8, longer_gaps=(6, 12))
    stack = StackConfig(
        width=64, attention=AttentionConfig(num_heads=2, rotary_width=16),
        recurrence=RecurrenceConfig(state_size=16, expand=1, head_width=32), feed_forward_width=128)
    return TaskConfig(
        data=data, stack=stack, mixers=("t", *RECURRENT), learning_rates=(5e-3,), schedule="wsd",
        num_steps=300, batch_size=16,
        test_sequences=256, conv_taps=0,
    )
