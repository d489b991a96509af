"""A small model of tokens through every command: trained, resumed, moved, and measured per byte of text."""
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import evaluate, generate, train
from experiments.data import ByteTokenizer, open_tokenizer
from experiments.data.source_text import read_source
from experiments.errors import UsageError
from experiments.runs.saved_run import SavedRun
from experiments.training.batches import open_data
from hnet import HNetLM, decode_state_bytes
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
    (["model.vocab_size=257"], r"has ids up to 2\d\d, and config\.model\.vocab_size is 257; set it to 2\d\d or"),
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


def _printed(capsys, *arguments) -> tuple[str, dict[str, float]]:
    """Runs evaluate; returns its first line and its metrics."""
    evaluate.main([str(argument) for argument in arguments])
    first, *lines = capsys.readouterr().out.splitlines()
    return first, {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_any_source_is_read_whole_without_a_split(token_run, tmp_path, capsys):
    """Against the model itself on each document, which fits into one window."""
    texts = [b"the of the chunk", b"return self import", b"\x04\xff", b"", b"x"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.md").write_bytes(text)
    first, metrics = _printed(capsys, f"--workdir={token_run}", f"--source=files:{tmp_path}/*.md")
    with SavedRun.open(token_run) as saved:
        tokenizer, params, model = saved.tokenizer(), saved.params(), HNetLM(saved.config.model)
    nats, num_bytes, num_tokens = 0.0, 0, 0
    for text in texts[:2]:
        ids = tokenizer.encode(text)
        log_p = jax.nn.log_softmax(model.apply({"params": params}, ids[None, :-1]).logits[0])
        nats -= float(log_p[np.arange(len(ids) - 1), ids[1:]].sum())
        num_bytes, num_tokens = num_bytes + tokenizer.num_bytes[ids[1:]].sum(), num_tokens + len(ids) - 1
    assert f"step 6, {num_bytes} bytes in 3 of 4 documents of files:" in first
    assert first.endswith("*.md, without 2 bytes that no token stands for")
    assert metrics["eval/nats_per_token"] == pytest.approx(nats / num_tokens, abs=6e-5)
    assert metrics["eval/bits_per_byte"] == pytest.approx(nats / num_bytes / math.log(2), abs=6e-5)


def test_models_of_bytes_and_of_tokens_read_the_same_bytes_of_a_source(token_run, finished_run, tmp_path, capsys):
    for number in range(20):
        (tmp_path / f"{number}.md").write_text(f"the chunk grün {number} " * 9)
    arguments = f"--source=files:{tmp_path}/*.md", "--config.eval_bytes=700"
    of_bytes, metrics = _printed(capsys, f"--workdir={finished_run}", *arguments)
    assert of_bytes.startswith("step 20, 700 bytes in 5 of 20 documents of files:")
    assert metrics.keys() == {"eval/bits_per_byte", "eval/stage0/boundary_rate", "eval/stage0/bytes_per_chunk"}
    of_tokens, _ = _printed(capsys, f"--workdir={token_run}", *arguments)
    assert of_tokens.startswith("step 6, 695 bytes in 5 of 20 documents")  # but for the first token of each


@pytest.mark.parametrize(("source", "message"), [
    ("files:{tmp}/*.txt", "no file matches '{tmp}/*.txt'"),
    ("files:{tmp}/empty", "all files that match '{tmp}/empty' are empty (1 of them); change --source"),
    ("files:{tmp}/foreign", "files:{tmp}/foreign has no text that the tokenizer's vocabulary can write"),
    ("files:{tmp}/one", "a split has a single token of text, which leaves none to predict; change --source"),
    ("nowhere", "--source=nowhere is not a source of text"),
])
def test_sources_without_text_are_refused(token_run, tmp_path, source, message):
    (tmp_path / "empty").touch()
    (tmp_path / "foreign").write_bytes(b"\xff\xff")
    (tmp_path / "one").write_bytes(b" the")
    text = _refusal(evaluate.main, f"--workdir={token_run}", f"--source={source.format(tmp=tmp_path)}")
    assert message.format(tmp=tmp_path) in text


def test_the_last_document_of_a_source_is_cut_between_characters(tmp_path):
    (tmp_path / "a").write_text("grün" * 50)
    for num_bytes in (2, 3, 4, 5, 1000):
        text = read_source(f"files:{tmp_path}/a", ByteTokenizer(), num_bytes=num_bytes)
        expected = {3: 2, 1000: 250}.get(num_bytes, num_bytes)
        assert text.num_bytes == expected and text.documents.lengths.tolist() == [expected]


# Generation


@pytest.fixture(scope="module")
def greedy(token_run):
    """A function of a text and a length: the most probable ids after it, each by the model on all before it."""
    with SavedRun.open(token_run) as saved:
        tokenizer, params, model = saved.tokenizer(), saved.params(), HNetLM(saved.config.model)
    logits = jax.jit(lambda ids: model.apply({"params": params}, ids).logits)

    def run(text: bytes, length: int) -> list[int]:
        ids = tokenizer.encode(text).tolist()
        start = len(ids)
        for _ in range(length):
            padded = np.zeros((1, 64), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(logits(padded)[0, len(ids) - 1, : tokenizer.vocab_size].argmax()))
        return ids[start:]

    return run


def test_generate_writes_the_text_of_the_most_probable_tokens(token_run, greedy, capsysbinary):
    generate.main([f"--workdir={token_run}", "--prompt=the of gr\udcfcn", "--length=30", "--temperature=0"])
    captured, prompt = capsysbinary.readouterr(), b"the of gr\xfcn"
    with SavedRun.open(token_run) as saved:
        tokenizer, num_prompt = saved.tokenizer(), len(saved.tokenizer().encode(prompt))
        size = decode_state_bytes(saved.config.model, 1, 64)
    assert captured.out == prompt + tokenizer.decode(greedy(prompt, 30)) + b"\n"
    assert captured.err == (
        f"the cache takes {size / 1e6:.1f} MB: 1 x 64 tokens\n"
        f"note: {num_prompt + 30} tokens with the prompt; the model was trained on windows of 32\n").encode()


def test_a_text_ends_at_the_tokenizers_end_token(token_run, greedy, tmp_path, capsysbinary):
    """A token that the model writes by itself is made the end of a text."""
    ids = greedy(b"return", 30)
    last = next(index for index, token in enumerate(ids) if token not in ids[:index] and index > 2)
    with SavedRun.open(token_run) as saved:
        tokenizer = saved.tokenizer()
    end = json.loads((token_run / "tokenizer.json").read_text())["model"]["vocab"]
    name = next(token for token, index in end.items() if index == ids[last])
    workdir = shutil.copytree(token_run, tmp_path / "run")
    (workdir / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
    generate.main([f"--workdir={workdir}", "--prompt=return", "--length=30", "--temperature=0", "--samples=2"])
    text = b"return" + tokenizer.decode(ids[:last])
    assert capsysbinary.readouterr().out == b"--- seed 0\n%s\n--- seed 1\n%s\n" % (text, text)


def test_a_chat_is_answered_without_its_markup(token_run, greedy, capsysbinary):
    generate.main([f"--workdir={token_run}", "--chat", "--prompt=import", "--length=9", "--temperature=0"])
    with SavedRun.open(token_run) as saved:
        tokenizer = saved.tokenizer()
    prompt = b"<|user|>user\nimport<|end|><|user|>model\n"
    assert capsysbinary.readouterr().out == tokenizer.decode(greedy(prompt, 9)) + b"\n"


def test_a_document_begins_with_bos_once_even_where_the_template_writes_it(tmp_path):
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path, add_bos_token=True)))
    assert generate.prompt_ids(tokenizer, b"") == [1]
    rendered = generate._prompt_ids(tokenizer, b"a", is_chat=True)  # its template begins with the same token
    assert rendered == tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "a"}])).tolist()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--prompt=a\x04\udcff"], "--prompt: the text has bytes that the vocabulary of {run}/tokenizer.json cannot "
                               "write: 04 ff (hex), the first at byte 1; leave them out"),
    ([], "--prompt: an empty prompt: no token stands ahead of this model's documents, so it needs some text"),
    (["--prompt=12345", "--length=12", "--config.model.context_length=16"],
     "--length=12: with the 5 tokens of the prompt these are 17, and the model's context_length is 16; "
     "set it to at most 11, or shorten the prompt"),
])
def test_prompts_that_do_not_fit_are_refused(token_run, arguments, message):
    text = _refusal(generate.main, f"--workdir={token_run}", *arguments)
    assert text == message.format(run=token_run)


def test_a_chat_needs_a_template(token_run, finished_run, tmp_path):
    assert _refusal(generate.main, f"--workdir={finished_run}", "--chat", "--prompt=a") == (
        "--chat: a model of bytes has no chat template; write the prompt out")
    workdir = shutil.copytree(token_run, tmp_path / "run")
    (workdir / "tokenizer_config.json").unlink()
    assert _refusal(generate.main, f"--workdir={workdir}", "--chat", "--prompt=a") == (
        f"--chat: {workdir}/tokenizer_config.json has no chat_template; write the prompt out")
