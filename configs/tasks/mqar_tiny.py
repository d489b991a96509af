"""Recall of 4 to 16 pairs in 64 to 128 tokens: tells mixers apart on one CPU.

  python -m experiments.tasks --config=mqar_tiny --outdir=runs/mqar
"""
from experiments.tasks.config import MQARConfig, TaskConfig
from hnet import StageConfig


def get_config():
    data = MQARConfig(
        vocab_size=128, train_lengths=(64, 64, 128), train_pairs=(4, 8, 16), train_shares=(1.0, 1.0, 1.0),
        test_lengths=(64, 64, 128), test_pairs=(4, 8, 16))
    stage = StageConfig(
        width=64, encoder="", decoder="", num_heads=2, rotary_width=16, feed_forward_width=128,
        ssm_state_size=16, ssm_head_width=32, ssm_chunk_size=32)
    return TaskConfig(
        data=data, stage=stage, mixers=("t", "m"), learning_rates=(3e-3, 1e-2), num_steps=800, batch_size=64,
        steps_per_call=10,
    ).to_config_dict()
