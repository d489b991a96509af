"""A suite scores what readers know, reads a model as one pass does, and continues where it was stopped."""
import json
import re
import shutil

import jax
import numpy as np
import pytest

from experiments.config import DataConfig
from experiments.data.tokenizer import ByteTokenizer
from experiments.errors import RunError, UsageError
from experiments.runs.saved_run import SavedRun
from experiments.tasks import __main__ as tasks_command
from experiments.tasks.longcontext import command, reader
from experiments.tasks.longcontext.generators import TASKS, Choices, Maker
from experiments.tasks.longcontext.prose import Prose
from experiments.tasks.longcontext.reader import Answered, ModelReader
from experiments.tasks.longcontext.scores import bootstrap, chances, score_all, wilson
from experiments.tasks.longcontext.suite import Answer, Result, ask, plan
from experiments.weights.run_directory import write_run
from hnet import HNetConfig, init_decode_state
from tests.support.assertions import SAME_COMPUTATION
from tests.support.models import compiled, make_stage, one_stage_config, random_params
from tests.support.small_tokenizer import tokenizer_json, vocabulary

DOCUMENTS = ["".join(f"Rule {number} holds.\n" for number in range(first, first + 50)).encode()
             for first in range(1000, 3000, 50)]
FACTS = ("needle", "multi_needle", "key_value")
DIGITS = np.frombuffer(b"0123456789", np.uint8)


def _answers(asked, tasks, *, length=512, draws=1) -> list[Result]:
    make = Maker(Prose(DOCUMENTS, ByteTokenizer()), ByteTokenizer(), Choices())
    origin = dict(read_seconds=1.0, answer_seconds=1.0, compile_seconds=1.0, state_bytes=1, peak_bytes=1,
                  commit="c", is_dirty=False, device="d", versions={}, config={})
    return [Result(name.task, name.length, name.draw, name.part,
                   ask(asked, examples, asked.read(examples[0].context)), **origin)
            for name, examples in plan(make, tasks, {length: draws}).items()]


def _score(results, **choices):
    scores = score_all(results, vocab_size=256, num_pairs=Choices().num_pairs)
    return {score.task: score for score in scores if score.depth is None}


# Readers that know, or guess


class Oracle:
    """Finds the question in the context, and reads on from there."""

    def read(self, context):
        return context

    def answer(self, state, question, answer):
        tail = question[2:]  # after the blank line
        found = state.tobytes().find(tail.tobytes())
        end = found // state.itemsize + len(tail)
        best = state[end : end + len(answer)] if found >= 0 else np.zeros_like(answer)
        return Answered(np.where(best == answer, 0.0, 9.0), best)


class Guesser:
    """Knows the form of answers alone: any digits, or one of the listed values."""

    def __init__(self):
        self.random = np.random.RandomState(0)

    def read(self, context):
        return re.findall(rb"\n\w+: (\d+)(?=\n)", context.astype(np.uint8).tobytes())

    def answer(self, state, question, answer):
        listed = len(answer) == 3
        best = np.frombuffer(state[self.random.randint(len(state))], np.uint8) if listed else self.random.choice(
            DIGITS, len(answer))
        return Answered(np.full(len(answer), np.log(10)), best)


def test_a_reader_that_looks_answers_up_is_always_right():
    scores = _score(_answers(Oracle(), [*FACTS, "copy"]))
    for task in FACTS:
        assert scores[task].exact == scores[task].right == 1 and scores[task].nats == 0
        assert scores[task].exact_interval[1] == pytest.approx(1)
    assert scores["copy"].exact == 1 and scores["copy without source"].exact < 1


def test_a_reader_that_guesses_gets_the_chance_level():
    scores = _score(_answers(Guesser(), FACTS, length=800, draws=25))
    for task in FACTS:
        assert scores[task].nats == pytest.approx(scores[task].nats_chance)
        low, high = scores[task].exact_interval
        assert low <= scores[task].exact_chance <= high
    assert scores["key_value"].exact_chance == 1 / 16 and scores["key_value"].exact > 0
    assert chances("copy without source", vocab_size=256, num_pairs=1) == (0.0, np.log(256))


# Scores


def test_an_interval_of_a_share_is_wilsons():
    assert wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)  # an example of many textbooks
    assert wilson(0, 5) == pytest.approx((0, 0.4345), abs=1e-4)


def test_an_interval_of_a_mean_shrinks_with_the_number_of_answers():
    few, many = bootstrap([0.0, 1.0] * 4), bootstrap([0.0, 1.0] * 400)
    assert bootstrap([0.5]) is None and few == bootstrap([0.0, 1.0] * 4)
    for low, high in (few, many):
        assert low < 0.5 < high
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * 0.5 / 800**0.5, rel=0.1)


def test_a_score_counts_digits_tokens_and_answers():
    answers = [Answer("needle", 0.5, 5, [1.0, 2.0], [True, True]), Answer("needle", 0.1, 5, [2.0], [False])]
    result = _answers(Oracle(), ["needle"])[0]
    result = Result(**{**vars(result), "answers": answers})
    whole, shallow, deep = score_all([result], vocab_size=256, num_pairs=4)
    assert (whole.depth, shallow.depth, deep.depth) == (None, 0.1, 0.5)
    assert (whole.exact, whole.right, whole.num_answers) == (0.5, 2 / 3, 2)
    assert whole.nats == pytest.approx((3 / 5 + 2 / 5) / 2) and deep.nats == pytest.approx(3 / 5)


# Models


LLAMA = HNetConfig(
    stages=(make_stage(
        width=16, encoder="T2", num_heads=4, num_key_heads=2, rotary_width=4, feed_forward_width=24),),
    vocab_size=len(vocabulary()[0]), context_length=600)


def _texts(config):
    """Draws a context, a question and an answer; the context takes two pieces of 48, the second not full."""
    random = np.random.RandomState(0)
    return [random.randint(config.vocab_size, size=size).astype(np.int32) for size in (70, 9, 17)]


def _one_pass(config, params, *texts):
    """Nats and the most probable tokens in place of the last text, after the others."""
    tokens, size = np.concatenate(texts), len(texts[-1])
    is_token = np.arange(96)[None] < len(tokens)
    padded = np.zeros((1, 96), np.int32)
    padded[is_token] = tokens
    logits = compiled(config.at_full_capacity())(params, padded, is_token.astype(np.int32)).logits[0]
    logits = np.asarray(jax.nn.log_softmax(logits))[len(tokens) - size - 1 : len(tokens) - 1]
    return -logits[np.arange(size), texts[-1]], logits.argmax(axis=-1)


@pytest.mark.parametrize(("config", "places"), [
    pytest.param(LLAMA, ("outside", "inside"), id="llama"),
    pytest.param(one_stage_config(), ("inside",), id="hierarchy", marks=pytest.mark.slow)])
def test_nats_from_a_state_are_those_of_one_pass_wherever_the_question_belongs(config, places, monkeypatch):
    monkeypatch.setattr(reader, "PIECE", 48)
    params, (context, question, answer) = random_params(config), _texts(config)
    expected, most_probable = _one_pass(config, params, context, question, answer)
    for place in places:
        model = ModelReader(config, params, 128, question=place)
        state = model.read(context)
        for _ in range(2):  # a question leaves the state as it was
            nats, best = model.answer(state, question, answer)
        np.testing.assert_allclose(nats, expected, atol=SAME_COMPUTATION)
        assert (best == most_probable).all()
        assert model.state_bytes(state) > 2 * 128 * 8 * 4


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_a_compression_that_forgets_everything_leaves_what_is_read_after_it(place, monkeypatch):
    monkeypatch.setattr(reader, "PIECE", 48)
    params, (context, question, answer) = random_params(LLAMA), _texts(LLAMA)
    model = ModelReader(LLAMA, params, 128, question=place,
                        compress=lambda state: init_decode_state(LLAMA, 1, state.max_length))
    nats, _ = model.answer(model.read(context), question, answer)
    left = question if place == "outside" else question[-1:]
    np.testing.assert_allclose(nats, _one_pass(LLAMA, params, left, answer)[0], atol=SAME_COMPUTATION)


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a small Llama of tokens with random weights, and text for it."""
    pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("run")
    for index, document in enumerate(DOCUMENTS):
        (directory / f"{index}.txt").write_bytes(document)
    write_run(directory / "llama", LLAMA, random_params(LLAMA), DataConfig(tokenizer="tokenizer.json"),
              source=directory, files={"tokenizer.json": tokenizer_json()})
    return directory


def _arguments(run, outdir, *more):
    return ["longcontext", f"--workdir={run / 'llama'}", f"--source=files:{run}/*.txt", f"--outdir={outdir}",
            "--lengths=420,600", "--draws=2,1", "--depths=0,0.5", *more]


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    outdir = tmp_path_factory.mktemp("out")
    assert tasks_command.main(_arguments(run, outdir)) == 0
    return outdir


def _results(outdir) -> list:
    """The records without what depends on the clock."""
    clock = {"read_seconds", "answer_seconds", "compile_seconds", "peak_bytes"}
    return [{name: value for name, value in record.items() if name not in clock}
            for record in json.loads((outdir / "results.json").read_text())]


def test_every_context_has_a_file_and_every_test_a_score(finished):
    names = {path.name for path in (finished / "contexts").iterdir()}
    assert len(names) == 3 * (2 + 1 + 1 + 2 + 1)
    assert {"needle-420-draw1-depth0.5.json", "copy-600-draw0-control.json", "position-420-draw0.json"} <= names
    summary = json.loads((finished / "summary.json").read_text())
    scored = {(score["task"], score["length"], score["depth"]): score for score in summary["scores"]}
    assert {task for task, _, depth in scored if depth is None} == {*TASKS, "copy without source"}
    assert scored["needle", 420, 0.5]["num_answers"] == 2 and scored["needle", 600, None]["num_answers"] == 2
    assert summary["settings"]["method"] == "none" and len(summary["settings"]["sha256"]) == 64
    [short, long] = summary["costs"]
    assert (short["length"], long["length"]) == (420, 600) and short["num_contexts"] == 14
    assert long["state_bytes"] > short["state_bytes"] > 0 and long["peak_bytes"] >= short["peak_bytes"] > 1e8


def test_the_table_the_picture_and_the_page_show_the_scores(finished):
    table, page = ((finished / name).read_text() for name in ("table.md", "longcontext.html"))
    summary = json.loads((finished / "summary.json").read_text())
    nats = next(score["nats"] for score in summary["scores"] if score["task"] == "copy" and score["length"] == 600)
    for text in (table, page):
        assert f"{nats:.3f} [" in text and "copy without source, nats" in text and "0.001 %" in text
    assert page.count("<svg") == 3 and "Needle by depth and length" in page
    assert not re.search(r"""(href|src)=["'](?!#)|url\((?!#)""", page), "a page stands alone"
    assert "420" in (finished / "plot.svg").read_text()


def test_a_stopped_suite_continues_and_comes_to_the_same(run, finished, tmp_path, monkeypatch, capsys):
    evaluate, read = command.evaluate, []

    def stop_at_the_fifth(reader, group, origin):
        read.append(group)
        if len(read) == 5:
            raise KeyboardInterrupt
        return evaluate(reader, group, origin)

    monkeypatch.setattr(command, "evaluate", stop_at_the_fifth)
    assert tasks_command.main(_arguments(run, tmp_path)) == 130
    assert len(list((tmp_path / "contexts").iterdir())) >= 4 and not (tmp_path / "results.json").exists()
    assert tasks_command.main(_arguments(run, tmp_path)) == 0
    assert "of them finished before" in capsys.readouterr().out
    assert len(read) == 5 + 18 - 4, "no context twice"
    assert _results(tmp_path) == _results(finished)
    monkeypatch.setattr(command, "evaluate", None)
    assert tasks_command.main(_arguments(run, tmp_path)) == 0
    assert "all contexts were finished before" in capsys.readouterr().out


def test_report_only_draws_what_is_finished(run, finished, tmp_path, capsys):
    with pytest.raises(RunError, match="none of the 21 runs is finished"):
        tasks_command.main(_arguments(run, tmp_path, "--report_only"))
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "contexts" / "needle-600-draw0-depth0.json").unlink()
    assert tasks_command.main(_arguments(run, tmp_path, "--report_only")) == 0
    assert "not finished and left out: needle 600 draw 0 depth0\n" in capsys.readouterr().out
    assert len(_results(tmp_path)) == 20


def test_results_of_other_settings_are_not_mixed_in(run, finished):
    for change, message in (("--seed=1", "was made with seed 0, and this command asks for 1"),
                            ("--pairs=4", "was made with pairs 16, and this command asks for 4"),
                            ("--question=inside", "was made with question 'outside'"),
                            ("--config.model.dtype=bfloat16", "was made with model.dtype 'float32'")):
        with pytest.raises(UsageError, match=re.escape(message)):
            tasks_command.main(_arguments(run, finished, change))


def test_a_run_of_bytes_needs_no_tokenizer(tmp_path, capsys):
    config = HNetConfig(stages=(make_stage(width=8, encoder="t1", num_heads=1, rotary_width=8),))
    write_run(tmp_path / "bytes", config, random_params(config), DataConfig(), source=tmp_path)
    arguments = [f"--workdir={tmp_path / 'bytes'}", "--lengths=300", "--draws=1", "--tasks=position,needle"]
    assert command.main(arguments) == 0
    assert (tmp_path / "bytes" / "longcontext" / "longcontext.html").exists()
    assert "0/5" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "message"), [
    (["--lengths=420,601", "--draws=1"], "--lengths: 601 tokens are past config.model.context_length 600"),
    (["--lengths=96", "--draws=1"], "96 tokens have no room for a context besides the 96"),
    (["--lengths=4k"], "--lengths=4k must be numbers, with commas between them"),
    (["--draws=1,2,3"], "--draws=1,2,3 must be a number of at least 1, or one for each of the different"),
    (["--draws=0"], "--draws=0 must be a number of at least 1"),
    (["--tasks=needle,neddle"], "--tasks 'neddle' is not one of needle, multi_needle, key_value, copy, position; "
                                "did you mean 'needle'?"),
    (["--depths=0.5,0.5"], "--depths=0.5,0.5 must be different numbers from 0 to 1"),
    (["--depths=1.5"], "--depths=1.5 must be different numbers from 0 to 1"),
    (["--pairs=0"], "--pairs=0 must be from 1 to 32"),
    (["--seed=-1"], "--seed=-1 must be from 0 to"),
    (["--source="], "--source is empty; it can be topics"),
    (["--source=stdlb"], "source=stdlb is not a source of text"),
    (["--workdir=/nowhere"], "no run has saved a checkpoint there"),
])
def test_a_command_is_refused_before_it_reads(run, tmp_path, change, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        tasks_command.main(_arguments(run, tmp_path / "out", *change))
    assert not (tmp_path / "out").exists()


def test_an_unknown_suite_is_refused():
    with pytest.raises(UsageError, match=r"'longcontxt' is no suite of tests; did you mean 'longcontext'\?"):
        tasks_command.main(["longcontxt"])


def test_a_model_that_needs_boundaries_is_refused(tmp_path):
    config = one_stage_config(router="given")
    write_run(tmp_path / "given", config, random_params(config), DataConfig(tokenizer="x"), source=tmp_path)
    with SavedRun.open(tmp_path / "given") as saved, pytest.raises(UsageError, match="reads boundaries"):
        command.check_context(saved, 10, "--lengths")
