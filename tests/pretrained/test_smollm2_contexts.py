"""SmolLM2-135M-Instruct finds facts and copies text, and has the induction heads that other code found."""
import json

import numpy as np
import pytest

from experiments.analysis.attention_rows import read_heads
from experiments.analysis.heads import induction, repeated_tokens
from experiments.tasks.longcontext import command
from tests.support.assertions import PRETRAINED_HEAD_SCORE_ERROR

pytestmark = pytest.mark.slow
INDUCTION_HEADS = {(18, 6): 0.90, (17, 3): 0.77, (18, 7): 0.60, (17, 4): 0.60, (20, 6): 0.46, (23, 2): 0.42}


def test_needles_are_found_and_passages_copied(smollm2, tmp_path):
    assert command.main([f"--workdir={smollm2.workdir}", f"--outdir={tmp_path}", "--lengths=1024", "--draws=1",
                         "--tasks=needle,copy"]) == 0
    scores = {score["task"]: score for score in json.loads((tmp_path / "summary.json").read_text())["scores"]
              if score["depth"] is None}
    assert scores["needle"]["exact"] == 1 and scores["needle"]["nats"] < 0.2
    assert scores["copy"]["nats"] < 0.6 and scores["copy without source"]["nats"] > 1.2


def test_induction_heads_are_those_that_other_code_found(smollm2):
    scores = []
    for draw in range(2):
        tokens = repeated_tokens(smollm2.tokenizer, 0, draw)
        [run], _ = read_heads(smollm2.config, smollm2.params, tokens)
        scores.append(induction(run, len(tokens) // 2))
    score = np.mean(scores, axis=0)
    order = [divmod(int(index), score.shape[1]) for index in np.argsort(-score, axis=None)[: len(INDUCTION_HEADS)]]
    assert set(order[:4]) == set(list(INDUCTION_HEADS)[:4])
    for head, expected in INDUCTION_HEADS.items():
        assert abs(score[head] - expected) < PRETRAINED_HEAD_SCORE_ERROR
