"""The commands as their users meet them: what they refuse and how, and what they make of a trained run."""
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import evaluate, generate, report, train
from experiments.data import BOS, ByteTokenizer, WindowSource
from experiments.runs.saved_run import SavedRun
from experiments.training.mesh import make_mesh
from hnet import HNetLM, Sampling
from tests.support.runs import KEPT_STEPS, finish, refusal, results, saved_steps, start

READERS = {"evaluate": evaluate.main, "generate": generate.main, "report": report.main}


def _refusal(main, *arguments) -> str:
    return refusal(main, [str(argument) for argument in arguments])


# Refusals


@pytest.mark.parametrize(("body", "code", "stderr"), [
    ("return None", 0, ""),
    ("return 143", 143, ""),
    ("raise RunError('the loss is nan')", 1, "error: the loss is nan\n"),
    ("raise UsageError('no such config')", 2, "error: no such config\n"),
    ("import logging; logging.warning('checkpoint 2 is damaged')", 0, "WARNING: checkpoint 2 is damaged\n"),
])
def test_how_a_command_ends(body, code, stderr, tmp_path):
    program = f"from experiments.errors import *\ndef main(argv):\n    {body}\nrun_command(main)"
    assert finish(start(program, cache=tmp_path), code=code) == ("", stderr)


@pytest.mark.parametrize(("program", "arguments", "message"), [
    ("train", ["--config=quickstrat"], "--config=quickstrat: no config of that name; did you mean 'quickstart'?"),
    ("evaluate", [], "no run has saved a checkpoint there"),
])
def test_a_mistake_costs_one_line_and_exit_code_2(program, arguments, message, tmp_path):
    process = start(program, *arguments, f"--workdir={tmp_path / 'run'}", cache=tmp_path)
    stdout, stderr = finish(process, code=2)
    assert stdout == "" and stderr.startswith("error: ") and message in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(("override", "message"), [
    ("optimizer.peak_lrr=1", "--config.optimizer.peak_lrr: config.optimizer has no field 'peak_lrr'; "
                             "did you mean 'peak_lr'?"),
    ("num_steps=many", "--config.num_steps=many: an int is wanted"),
    ("num_steps=0", "num_steps 0 must be at least 1"),
    ("seed=-1", "seed -1 must be from 0 to 2**32 - 1"),
    ("optimizer.schedule=cosin", "'cosin' is not one of wsd, wsd_inverse_sqrt, cosine; did you mean 'cosine'?"),
    ("optimizer.decay_fraction=1.5", "optimizer.decay_fraction 1.5 must be from 0 to 1"),
    ("optimizer.max_grad_norm=-1", "optimizer.max_grad_norm -1.0 must not be negative"),
    ("optimizer.accumulation_steps=3", "data.batch_size 8 is not a multiple of optimizer.accumulation_steps 3"),
    ("tokens_per_chunk=(4.0, 4.0)", "tokens_per_chunk (4.0, 4.0) must have one value"),
    ("model.stages.stage0.stack.attention.num_heads=3", "num_heads 3 must divide width 16"),
    ("model.stages.stage0.encoder=x4", "layout 'x4' must be names of mixers"),
    ("model.stages.stage0.stack.width=64", "stages must not get narrower going inward"),
    ("model.vocab_size=100", "model.vocab_size 100 cannot hold all 256 bytes"),
    ("data.batch_size=6", "config.data.batch_size 6 in 1 parts does not divide over 8 devices"),
    ("model_axis=3", "config.model_axis 3 does not divide the 8 devices; use one of [1, 2, 4, 8]"),
    ("data.source=files:/nowhere/*.txt", "no file matches '/nowhere/*.txt'"),
    ("data.source=stdlb", "stdlb"),
])
def test_training_refuses_what_does_not_fit(tiny, tmp_path, override, message):
    workdir = tmp_path / "run"
    text = _refusal(train.main, f"--config={tiny}", f"--workdir={workdir}", f"--config.{override}")
    assert message in text
    assert not workdir.exists() or not any(workdir.iterdir())


def test_an_empty_corpus_is_refused(tiny, tmp_path):
    (tmp_path / "empty.txt").touch()
    text = _refusal(train.main, f"--config={tiny}", f"--workdir={tmp_path / 'run'}",
                    f"--config.data.source=files:{tmp_path}/*.txt")
    assert re.search(r"all files that match .* are empty", text)


def test_a_workdir_below_a_file_is_refused(tiny):
    text = _refusal(train.main, f"--config={tiny}", f"--workdir={tiny}/run")
    assert text.startswith(f"--workdir={tiny}/run: cannot write there (Not a directory)")


@pytest.mark.parametrize(("override", "message"), [
    ("model.stages.stage1.stack.width=48",
     r"checkpoint 20 in .* does not fit this config: .*; use another --workdir"),
    ("data.source=files:{configs}/text/1*.txt", "the corpus changed since checkpoint 20: it had .* and is now"),
    ("num_steps=19", r"the run is at step 20, past config\.num_steps 19; raise config\.num_steps"),
])
def test_a_run_is_not_resumed_as_another_one(finished_run, tiny, configs, override, message):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    override = override.format(configs=configs)
    assert re.search(message, _refusal(
        train.main, f"--config={tiny}", f"--workdir={finished_run}", f"--config.{override}"))
    changed = {path for path in finished_run.rglob("*") if before.get(path) != path.stat().st_mtime_ns}
    assert changed <= {finished_run}


@pytest.mark.parametrize("name", READERS)
def test_a_workdir_without_checkpoints_is_refused(name, tmp_path):
    assert "no run has saved a checkpoint there" in _refusal(READERS[name], f"--workdir={tmp_path}")
    (tmp_path / "checkpoints").mkdir()
    assert "no checkpoint in" in _refusal(READERS[name], f"--workdir={tmp_path}")


@pytest.mark.parametrize("name", READERS)
def test_a_step_that_was_not_saved_is_refused(name, finished_run):
    text = _refusal(READERS[name], f"--workdir={finished_run}", "--step=7")
    assert text.startswith("no checkpoint 7 in ") and text.endswith("; steps there: 10, 15, 20")


@pytest.mark.parametrize(("argument", "message"), [
    ("--length=-1", "--length -1 must be at least 0"), ("--samples=0", "--samples 0 must be at least 1"),
    ("--temperature=-0.5", "temperature and top_k must be >= 0"), ("--temperature=nan", "temperature=nan"),
    ("--top_p=0", "top_p=0.0"), ("--prompt_file=/no/such/file", "No such file"),
])
def test_generate_refuses_what_it_cannot_do(finished_run, argument, message):
    assert message in _refusal(generate.main, f"--workdir={finished_run}", argument)


def test_a_router_that_must_be_told_is_refused_before_work(tiny, tmp_path):
    text = _refusal(train.main, f"--config={tiny}", f"--workdir={tmp_path / 'run'}",
                    "--config.model.stages.stage0.chunking.router=given")
    assert text.startswith(
        "config.model.stages.stage0.chunking.router 'given' needs boundary_levels in every batch")
    assert not (tmp_path / "run").exists()


def test_a_reader_that_has_seen_enough_ends_a_command_quietly():
    program = "from experiments.errors import run_command\nrun_command(lambda _: print('x' * 10_000_000))"
    shell = f'"{sys.executable}" -c "{program}" | head -c 3; echo " ${{PIPESTATUS[0]}}"'
    run = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("xxx 141\n", "")


# A trained run


def test_evaluate_prints_what_training_logged_last(finished_run, capsys):
    evaluate.main([f"--workdir={finished_run}"])
    head, *lines = capsys.readouterr().out.splitlines()
    logged = results(finished_run)[-1]
    assert head.startswith("step 20, ")
    assert lines == [f"{name} {value:.4f}" for name, value in logged.items() if name != "step"]
    assert "eval/bits_per_byte" in logged
    assert saved_steps(finished_run) == list(KEPT_STEPS)


def test_evaluate_is_the_mean_surprise_over_every_byte_of_the_held_out_documents(run, finished_run, capsys):
    """Against numpy: each document is read after its BOS, and only bytes of the same document predict a byte."""
    evaluate.main([f"--workdir={finished_run}", "--config.eval_bytes=1_000_000"])
    head, bits, *_ = capsys.readouterr().out.splitlines()
    split = run.corpus().split("held_out")
    source = WindowSource(split, run.config.data.sequence_length, seed=0)
    windows = [source[index] for index in range(len(source))]
    tokens, segments = (np.stack([window[key] for window in windows]) for key in ("tokens", "segment_ids"))
    model = HNetLM(run.config.model.at_full_capacity())
    logits = jax.jit(model.apply)({"params": run.params}, tokens[:, :-1], segments[:, :-1]).logits
    odds = np.exp(np.asarray(logits, np.float64))
    probability = np.take_along_axis(odds, tokens[:, 1:, None], axis=-1)[..., 0] / odds.sum(axis=-1)
    is_byte = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    assert is_byte.sum() == split.lengths.sum()
    assert head == f"step 20, {split.lengths.sum():,} held-out bytes"
    assert float(bits.split()[1]) == pytest.approx(-np.log2(probability[is_byte]).mean(), abs=1e-4)


def test_evaluate_takes_a_step_and_overrides(finished_run, capsys):
    evaluate.main([f"--workdir={finished_run}", "--step=10", "--config.eval_bytes=100"])
    head, bits, *_ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 10, 1\d\d held-out bytes", head)
    assert float(bits.split()[1]) > results(finished_run)[-1]["eval/bits_per_byte"]


@pytest.fixture(scope="module")
def run(finished_run):
    with SavedRun.open(finished_run) as saved:
        return SimpleNamespace(config=saved.config, params=saved.params(), corpus=saved.corpus)


def _text(run, prompt: bytes, length: int, temperature: float, seed: int) -> bytes:
    tokenizer = ByteTokenizer()
    pieces = generate.generate_pieces(
        run.config, run.params, [generate.prompt_ids(tokenizer, prompt)], tokenizer, length=length,
        sampling=Sampling(temperature=temperature), seed=seed)
    return b"".join(piece for (piece,) in pieces)


def test_a_seed_says_which_text_and_at_temperature_0_there_is_only_one(run):
    first, again, other = (_text(run, b"the ", 40, 1.0, seed) for seed in (0, 0, 1))
    assert len(first) == 40 and first == again and first != other
    assert _text(run, b"the ", 40, 0.0, seed=0) == _text(run, b"the ", 40, 0.0, seed=1)


def test_at_temperature_0_every_byte_is_the_most_probable_one_after_all_before_it(run):
    size, prompt = run.config.data.sequence_length, "grün".encode("latin-1") * 3
    text = _text(run, prompt, 2 * size, 0.0, seed=0)
    assert len(text) == 2 * size
    model = HNetLM(run.config.model.at_full_capacity())
    stream = np.array([BOS, *prompt, *text], np.int32)
    logits = jax.jit(model.apply)({"params": run.params}, stream[None]).logits
    logits = np.asarray(logits[0, len(prompt) : -1, :256])
    chosen = np.take_along_axis(logits, stream[1 + len(prompt) :, None], axis=1)[:, 0]
    assert (chosen > logits.max(axis=-1) - 1e-4).all()


def test_generate_prints_the_prompt_and_its_continuation_byte_for_byte(run, finished_run, capsysbinary):
    """On a command line, Python stands bytes that are not UTF-8 in for by lone surrogates."""
    generate.main([f"--workdir={finished_run}", "--prompt=gr\udcfcn \u00fc", "--length=50", "--seed=3"])
    prompt = b"gr\xfcn \xc3\xbc"
    captured = capsysbinary.readouterr()
    assert captured.out == prompt + _text(run, prompt, 50, 0.7, seed=3) + b"\n"
    assert captured.err == b"note: 58 bytes with the prompt; the model was trained on windows of 32\n"


@pytest.mark.slow
def test_generate_reads_a_prompt_of_any_length_from_a_file_and_draws_several_samples(
        run, finished_run, tmp_path, capsysbinary):
    prompt = b"the chunk of " * 20
    (tmp_path / "prompt.txt").write_bytes(prompt)
    generate.main([f"--workdir={finished_run}", f"--prompt_file={tmp_path / 'prompt.txt'}", "--length=9",
                   "--samples=2", "--seed=4"])
    continuations = {seed: _text(run, prompt, 9, 0.7, seed) for seed in (4, 5)}
    assert capsysbinary.readouterr().out == b"".join(
        b"--- seed %d\n" % seed + prompt + text + b"\n" for seed, text in continuations.items())


def test_report_is_written_anew(finished_run, tmp_path, capsys):
    workdir = shutil.copytree(finished_run, tmp_path / "a_run")
    (workdir / "report.html").write_text("stale")
    report.main([f"--workdir={workdir}"])
    assert capsys.readouterr().out == f"{workdir / 'report.html'}\n"
    page = (workdir / "report.html").read_text()
    assert "<title>a_run: training report</title>" in page and "held out: " in page
    assert f"{results(finished_run)[-1]['eval/bits_per_byte']:.3f}</b>" in page


@pytest.mark.parametrize(("name", "stages", "sentence"), [
    ("isotropic", [], "This model has no stages"),
    pytest.param("two_stage", ["stage0", "stage1"], "An inner stage sees", marks=pytest.mark.slow),
])
def test_training_ends_with_a_report(name, stages, sentence, configs, tmp_path, capsys, monkeypatch):
    one_device = make_mesh(1, jax.devices()[:1])  # compiles in half the time
    monkeypatch.setattr(train, "make_mesh", lambda model_axis: one_device)
    assert train.main([f"--config={configs / name}.py", f"--workdir={tmp_path}"]) == 0
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert sentence in page
    assert sorted(set(re.findall(r"bytes per chunk, (stage\d)", page))) == stages
