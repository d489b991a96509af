"""A small model of tokens through every command: trained, resumed, moved, and measured per byte of text."""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import evaluate, train
from experiments.errors import UsageError
from experiments.runs.saved_run import SavedRun
from experiments.training.batches import open_data
from tests.experiments.test_commands import _refusal
from tests.support.runs import results, saved_steps
from tests.support.small_tokenizer import write_tokenizer

NUM_STEPS = 6


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("elsewhere") / "tokens")


@pytest.fixture(scope="module")
def train_tokens(configs, tokenizer_path):
    """A function of workdir and overrides: trains a model of tokens there."""
    def run(workdir: Path, *overrides: str) -> int:
        settings = {"data.tokenizer": tokenizer_path, "model.vocab_size": 320, "num_steps": NUM_STEPS,
                    "checkpoint_every": 2, "eval_every": 3, "log_every": 1, "optimizer.peak_lr": 3e-2,
                    "optimizer.warmup_steps": 0, "report": False}
        arguments = [f"--config.{name}={value}" for name, value in settings.items()]
        return train.main([f"--config={configs / 'isotropic.py'}", f"--workdir={workdir}", *arguments, *overrides])

    return run


@pytest.fixture(scope="module")
def token_run(train_tokens, tmp_path_factory) -> Path:
    """The workdir of a trained model of tokens; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("token runs") / "run"
    assert train_tokens(workdir) == 0
    return workdir


# Training


def test_a_model_of_tokens_learns_and_counts_bits_per_byte_of_text(token_run):
    with SavedRun.open(token_run) as saved:
        data = open_data(saved.config, token_run)
    records = [record for record in results(token_run) if "train/loss_nats" in record]
    for record in records:
        batch = data.batches[record["step"] - 1]
        ids = batch["segment_ids"]
        is_target = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)
        num_bytes = data.tokenizer.num_bytes[batch["tokens"][:, 1:]][is_target].sum()
        assert num_bytes > is_target.sum()
        assert record["train/target_bytes"] == num_bytes
        expected = record["train/loss_nats"] * is_target.sum() / num_bytes / math.log(2)
        np.testing.assert_allclose(record["train/bits_per_byte"], expected, rtol=1e-5)
    evaluations = [record for record in results(token_run) if "eval/bits_per_byte" in record]
    assert [record["step"] for record in evaluations] == [3, 6]
    assert evaluations[1]["eval/nats_per_token"] < evaluations[0]["eval/nats_per_token"] < math.log(320)


def test_a_resumed_run_of_tokens_equals_an_uninterrupted_one(token_run, train_tokens, tmp_path, capsys):
    workdir = shutil.copytree(token_run, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "6")
    assert train_tokens(workdir) == 0
    output = capsys.readouterr()
    assert "resuming at step 4\n" in output.out and "changed config" not in output.err
    assert results(workdir) == results(token_run) and saved_steps(workdir) == saved_steps(token_run)


def test_another_tokenizer_is_another_corpus(token_run, train_tokens, tmp_path):
    workdir, other = shutil.copytree(token_run, tmp_path / "run"), write_tokenizer(tmp_path / "other", pre="gpt-2")
    with pytest.raises(UsageError, match=r"the corpus changed since checkpoint 6.*config\.data\.tokenizer"):
        train_tokens(workdir, f"--config.data.tokenizer={other}", "--config.num_steps=9")
    assert (workdir / "tokenizer.json").read_text() == (token_run / "tokenizer.json").read_text()


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.vocab_size=257"], r"has ids up to 2\d\d, and config.model.vocab_size is 257; set it to 2\d\d or more"),
    (["data.tokenizer=nowhere/tokenizer.json"], "there is no such file"),
    (["data.sequence_length=1"], "data.sequence_length 1 must be at least 2 tokens"),
])
def test_what_does_not_fit_a_model_of_tokens_is_refused(train_tokens, tmp_path, overrides, message):
    with pytest.raises(UsageError, match=message):
        train_tokens(tmp_path / "run", *(f"--config.{each}" for each in overrides))
    assert not any((tmp_path / "run").glob("*"))


def test_a_run_keeps_its_tokenizer_wherever_it_is_moved(token_run, tokenizer_path, tmp_path, monkeypatch):
    workdir = shutil.copytree(token_run, tmp_path / "moved")
    assert json.loads((workdir / "config.json").read_text())["data"]["tokenizer"] == "tokenizer.json"
    monkeypatch.chdir(tmp_path)  # where there is no tokenizer.json
    with SavedRun.open(workdir) as saved:
        tokenizer = saved.tokenizer()
    assert tokenizer.path == workdir / "tokenizer.json" and tokenizer.render_chat([])
    (workdir / "tokenizer.json").unlink()
    assert "'tokenizer.json': there is no such file" in _refusal(evaluate.main, f"--workdir={workdir}")


# Evaluation


def test_evaluation_prints_what_training_logged(token_run, capsys):
    evaluate.main([f"--workdir={token_run}"])
    lines = dict(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith("eval/"))
    logged = results(token_run)[-1]
    assert float(lines["eval/bits_per_byte"]) == pytest.approx(logged["eval/bits_per_byte"], abs=6e-5)
    assert float(lines["eval/nats_per_token"]) == pytest.approx(logged["eval/nats_per_token"], abs=6e-5)
