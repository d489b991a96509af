"""A small model of tokens through every command: trained, resumed, moved, and measured per byte of text."""
import contextlib
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import describe, evaluate, generate, inspect, report, sweep, train
from experiments.analysis import boundaries
from experiments.analysis.boundaries import chunk_texts
from experiments.analysis.chunk_statistics import bits_per_byte
from experiments.analysis.chunked_text import characters
from experiments.analysis.flops import model_flops_per_byte
from experiments.data import ByteTokenizer, open_tokenizer
from experiments.data.source_text import read_source
from experiments.errors import UsageError
from experiments.runs.saved_run import SavedRun
from experiments.training.batches import open_data
from hnet import HNetLM, decode_state_bytes
from tests.experiments.pages.test_report import Page
from tests.experiments.test_commands import _refusal
from tests.support.models import random_params
from tests.support.runs import config_of, results, saved_steps
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


def test_weights_to_start_from_must_read_the_same_tokens(token_run, train_tokens, tmp_path, capsys):
    settings = f"--config.init_from={token_run}", "--config.num_steps=1"
    other = write_tokenizer(tmp_path / "other", pre="gpt-2")
    message = (f"config.init_from={token_run} reads the tokens of {token_run}/tokenizer.json, and this run reads "
               f"others; set --config.data.tokenizer={token_run}/tokenizer.json")
    for tokenizer in (other, ""):
        with pytest.raises(UsageError, match=re.escape(message)):
            train_tokens(tmp_path / f"of {bool(tokenizer)}", *settings, f"--config.data.tokenizer={tokenizer}")
    assert train_tokens(tmp_path / "same", *settings) == 0
    assert "starting from the weights of" in capsys.readouterr().out


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


# Looking inside


@pytest.fixture(scope="module")
def two_stage_run(configs, tokenizer_path):
    """A model of tokens with random weights that cuts its tokens into chunks, as `inspect` opens it."""
    config = config_of(configs / "two_stage.py", f"data.tokenizer={tokenizer_path}", "model.vocab_size=320")
    return SimpleNamespace(workdir=tokenizer_path.parent, config=config, step=3, tokenizer=lambda: open_tokenizer(
        str(tokenizer_path)), params=lambda: random_params(config.model))


TEXT = "the chunk of importing grün 123 and the end".encode() * 3


@pytest.mark.parametrize("add_bos", [False, True])
def test_results_of_tokens_are_spread_over_their_bytes(two_stage_run, tmp_path, add_bos):
    """Against the model on the whole text, which fits into one window."""
    config = dataclasses.replace(
        two_stage_run.config, data=dataclasses.replace(two_stage_run.config.data, sequence_length=256))
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path, add_bos_token=add_bos)))
    params = two_stage_run.params()
    (chunked,) = chunk_texts(config, params, [("t", TEXT)], tokenizer)
    ids = tokenizer.encode(TEXT)
    stream = np.concatenate([[tokenizer.bos] if add_bos else [], ids]).astype(np.int32)
    output = jax.jit(HNetLM(config.model).apply)({"params": params}, stream[None])
    log_p = jax.nn.log_softmax(output.logits[0])
    nats = -np.asarray(log_p)[np.arange(len(stream) - 1), stream[1:]]
    known = slice(0 if add_bos else 1, None)
    assert np.isnan(chunked.token_nats()[0]) != add_bos
    np.testing.assert_allclose(chunked.token_nats()[known], nats, atol=1e-4)
    starts = np.cumsum(tokenizer.num_bytes[ids]) - tokenizer.num_bytes[ids]
    assert np.flatnonzero(chunked.token_starts).tolist() == starts.tolist()
    assert bits_per_byte(chunked) == pytest.approx(
        nats.sum() / math.log(2) / tokenizer.num_bytes[ids[known]].sum(), rel=1e-5)
    outer, inner = chunked.stages
    seen = output.stages["stage0"]
    np.testing.assert_array_equal(outer.is_boundary[starts], np.asarray(seen.boundary_mask[0])[int(add_bos) :])
    np.testing.assert_allclose(outer.boundary_prob[starts], np.asarray(seen.boundary_prob[0])[int(add_bos) :],
                               atol=1e-5)
    elsewhere = np.setdiff1d(np.arange(len(TEXT)), starts)
    assert np.isnan(outer.boundary_prob[elsewhere]).all() and not outer.is_boundary[elsewhere].any()
    assert (inner.is_boundary <= outer.is_boundary).all()
    (empty,) = chunk_texts(config, params, [("empty", b"")], tokenizer)
    assert empty.nats.shape == (0,) and np.isnan(bits_per_byte(empty))


def test_long_texts_of_tokens_are_read_in_windows_of_few_rows(two_stage_run, monkeypatch):
    tokenizer, params, calls = two_stage_run.tokenizer(), two_stage_run.params(), []
    texts = [("a", TEXT * 3), ("b", TEXT)]
    together = chunk_texts(two_stage_run.config, params, texts, tokenizer)
    monkeypatch.setattr(boundaries, "LARGEST_LOGITS", 2 * 32 * 320)
    two_by_two = chunk_texts(two_stage_run.config, params, texts, tokenizer,
                             on_call=lambda done, total: calls.append((done, total)))
    assert calls == [(index, len(calls)) for index in range(1, len(calls) + 1)] and len(calls) > 3
    for one, other in zip(together, two_by_two, strict=True):
        np.testing.assert_allclose(one.nats, other.nats, atol=1e-4)
        assert np.isfinite(one.nats[5:]).all()


def test_inspect_shows_every_token_with_its_nats(two_stage_run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(inspect.SavedRun, "from_command_line", lambda *_: contextlib.nullcontext(two_stage_run))
    inspect.main(["--workdir=w", f"--html={tmp_path}/page.html", f"--text={TEXT.decode()}"])
    shown = capsys.readouterr().out
    tokenizer = two_stage_run.tokenizer()
    tokens = [tokenizer.decode([index]) for index in tokenizer.encode(TEXT)]
    mean = len(TEXT) / len(tokens)
    assert f"\n{len(tokens)} tokens, {mean:.2f} bytes per token; {len(TEXT)} bytes, each |" in shown
    line = next(line for line in shown.splitlines() if line.startswith("t["))
    found = re.findall(r"(.*?)\[(-|\d+\.\d)\](?:\||$)", line)
    assert [text for text, _ in found if "\\x" not in text] == [
        token.decode() for token in tokens if token.isascii()]
    assert [nats == "-" for _, nats in found] == [True] + [False] * (len(tokens) - 1)
    assert re.search(r"^upper case +\d+ +\d", shown, re.M) and "stage0: " in shown
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.bytes_of_pre == [TEXT] * 3  # tokens, and two stages
    per_character = sum(len(list(characters(token))) for token in tokens[1:])
    assert len(page.attributes("data-nats")) == per_character


def test_inspect_refuses_bytes_that_the_vocabulary_lacks(token_run):
    assert "cannot write: ff (hex), the first at byte 1" in _refusal(
        inspect.main, f"--workdir={token_run}", "--text=a\udcff")


def test_a_report_of_a_model_of_tokens_is_written(token_run, tmp_path, capsys):
    workdir = shutil.copytree(token_run, tmp_path / "run")
    report.main([f"--workdir={workdir}"])
    page = (workdir / "report.html").read_text()
    assert "data-nats" in page and "bytes per token" in page


# Costs


def test_a_model_of_tokens_is_described_in_tokens_from_its_workdir(token_run, capsys):
    describe.main([f"--workdir={token_run}", "--config.model.context_length=640", "--json"])
    told = json.loads(capsys.readouterr().out)
    with SavedRun.open(token_run) as saved:
        config = saved.config
    forward = model_flops_per_byte(dataclasses.replace(config.model, context_length=640), 32, ())
    assert told["flops"] == {"forward_per_token": forward, "training_per_token": 3 * forward,
                             "training_per_step": 3 * forward * 16 * 32}
    assert told["memory"]["decode_state_per_row"] == decode_state_bytes(config.model, 1, 640)
    describe.main([f"--workdir={token_run}"])
    text = capsys.readouterr().out
    assert "work in rows of 32 tokens" in text and "forward, per token" in text
    assert text.endswith("room for 32 tokens\n") and "begin a chunk" not in text and "byte" not in text


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "neither of --config=NAME and --workdir=RUN given; give one"),
    (["--config=quickstart", "--workdir=w"], "both of --config=NAME and --workdir=RUN given; give one"),
    (["--workdir=/nowhere"], "no run has saved a checkpoint there"),
])
def test_describe_wants_a_config_or_a_run(arguments, message):
    assert message in _refusal(describe.main, *arguments)


def test_a_sweep_counts_work_per_byte_and_takes_runs_with_their_own_tokenizer(token_run, tokenizer_path, tmp_path):
    workdir = shutil.copytree(token_run, tmp_path / "run")
    with SavedRun.open(workdir) as saved:
        asked = dataclasses.replace(saved.config.data, tokenizer=str(tokenizer_path))
        config = dataclasses.replace(saved.config, data=asked)
    run = sweep.Run("run", 0, config, workdir, [])
    sweep._refuse_another_config(run)
    corpus = json.loads((workdir / "manifest.json").read_text())["corpus"]
    assert sweep.result_of(run).flops_per_byte == pytest.approx(
        model_flops_per_byte(config.model, 32, ()) * corpus["tokens"] / corpus["bytes"])
    of_bytes = dataclasses.replace(config, data=dataclasses.replace(asked, tokenizer=""))
    with pytest.raises(UsageError, match=r"was trained with config\.data\.tokenizer 'tokenizer\.json'"):
        sweep._refuse_another_config(dataclasses.replace(run, config=of_bytes))
