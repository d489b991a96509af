"""Scores of heads find the patterns they are named for, in arrays made by hand and in models."""
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.analysis import __main__ as command
from experiments.analysis.attention_rows import RunOfHeads, read_heads, token_slots
from experiments.analysis.heads import (
    PERIOD,
    induction,
    is_copied,
    previous,
    repeated_tokens,
    report,
    retrieval,
    score_heads,
)
from experiments.config import DataConfig
from experiments.data.tokenizer import ByteTokenizer
from experiments.errors import UsageError
from experiments.tasks.longcontext.examples import Example
from experiments.weights.run_directory import write_run
from hnet import HNetConfig
from layers import CAUSAL, Window, attend, rotary
from tests.support.assertions import assert_matches, golden
from tests.support.models import make_stage, one_stage_config, random_params

SHARP = 100.0  # a score that leaves nothing for other keys


def _run(queries, keys, *, slots=None, window=None) -> RunOfHeads:
    """One layer of heads, [h, t, k] each."""
    queries, keys = (jnp.asarray(np.stack(x, axis=1)[None], jnp.float32) for x in (queries, keys))
    slots = np.arange(queries.shape[1]) if slots is None else slots
    return RunOfHeads("stage0", "encoder", 0, 0, queries, keys, window, slots)


def _looking(at: np.ndarray, size: int, *, slots=None, window=None) -> RunOfHeads:
    """One layer of heads [h]: row i of head h attends to row at[h, i] alone."""
    eye = SHARP * np.eye(size)
    return _run([eye[row] for row in at], [eye] * len(at), slots=slots, window=window)


# Patterns


def test_heads_that_repeat_what_followed_are_told_from_those_that_look_back():
    size = 2 * PERIOD + 1  # a token ahead
    rows = np.arange(size)
    at = np.stack([np.maximum(rows - PERIOD + 1, 0), np.maximum(rows - 1, 0), np.maximum(rows - PERIOD, 0)])
    run = _looking(at, size)
    np.testing.assert_allclose(induction(run, PERIOD + 1), [[1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(previous(run)[0, 1:], [1, 0], atol=1e-2)  # the first row has no other choice


def test_in_a_stage_of_chunks_a_token_counts_as_its_chunk():
    slots = np.arange(2 * PERIOD) // 2
    rows = np.arange(PERIOD)
    at = np.stack([np.maximum(rows - PERIOD // 2 + 1, 0), np.maximum(rows - PERIOD // 2, 0)])
    np.testing.assert_allclose(induction(_looking(at, PERIOD, slots=slots), PERIOD), [[1, 0]], atol=1e-6)


def test_a_copy_attends_to_the_very_token_that_comes_next_within_the_fact():
    tokens = np.array([7, 5, 6, 8, 9, 5, 1, 2, 5, 6])  # the fact is at 4 to 6, the answer 5 6 at the end
    context, question, answer = tokens[:7], tokens[7:8], tokens[8:]
    example = Example("needle", context, question, answer, num_units=2, origin=(1, 4))
    at = np.tile(np.arange(10), (4, 1))
    at[0, 7:9] = 1, 2  # 5 and 6 of the fact
    at[1, 7:9] = 5, 2  # the first 5 is another one
    at[2, 7:9] = 3, 3  # of the fact, but another token
    at[3, 7:9] = 2, 1  # of the fact, the wrong way around
    copied, mass = retrieval(_looking(at, 10), tokens, example)
    np.testing.assert_allclose(copied, [[1, 0.5, 0, 0]])
    np.testing.assert_allclose(mass, [[1, 0.5, 1, 1]], atol=1e-6)


def test_retrieval_scores_are_those_of_the_paper_but_for_the_count():
    case = golden("sys_retrieval_head")
    start, stop = case["needle"]
    top = case["attn_last_row_padded"].argmax(axis=-1).transpose(1, 2, 0)  # [layer, head, step]
    copied = is_copied(top, np.arange(start, stop), case["prompt_ids"][start:stop], case["generated"])
    np.testing.assert_allclose(copied.sum(axis=-1) / (stop - start), case["score"])


def test_attention_is_that_of_the_layer_with_groups_of_heads_and_a_window():
    random = np.random.default_rng(0)
    queries, keys = random.normal(size=(4, 30, 8)), random.normal(size=(2, 30, 8))
    for window in (None, 5):
        run = _run(queries, keys, window=window)
        mask = CAUSAL if window is None else CAUSAL & Window(window)
        q, k = run.queries, run.keys  # one layer stands for one row
        expected = attend(q, k, jnp.broadcast_to(jnp.eye(30)[None, :, None], (1, 30, 2, 30)), mask=mask).o
        rows = np.array([3, 29])
        for key in (0, 3, 27):
            mass, top = run.attention(rows, np.broadcast_to(np.arange(30) == key, (2, 30)))
            assert_matches(mass[0].T, expected[0, rows, :, key] + 0.0, dtype="float32", scale=10)
            assert (top[0].T == expected[0, rows].argmax(axis=-1)).all()


# Models


def _looks_back() -> tuple[HNetConfig, dict]:
    """A model of one layer whose head 1 attends to the token before."""
    config = HNetConfig(stages=(make_stage(
        width=16, encoder="t1", num_heads=2, rotary_width=8, rotary_base=4.0),))
    params = random_params(config)
    params["embedding"] = params["embedding"].at[:, 0].set(30.0)  # nearly all there is after the norm
    mixer = params["stage0"]["encoder"]["run0"]["mixer"]
    feature = jnp.ones((1, 1, 1, 8))
    one_back = rotary(feature, jnp.ones((1, 1), jnp.int32), width=8, base=4.0)
    qkv = mixer["qkv"]["kernel"]  # [layers, width, 3, heads, head width]
    qkv = qkv.at[0, :, :2, 1].set(0.0).at[0, 0, 0, 1].set(5 * feature[0, 0, 0]).at[0, 0, 1, 1].set(
        5 * one_back[0, 0, 0])
    mixer["qkv"]["kernel"] = qkv
    return config, params


def test_a_model_whose_head_looks_one_token_back_is_found_out():
    config, params = _looks_back()
    repeats = [repeated_tokens(ByteTokenizer(), 0, draw) for draw in range(2)]
    fact = Example("needle", *(np.arange(size, dtype=np.int32) for size in (40, 3, 2)), num_units=2, origin=(1, 4))
    heads, nats = score_heads(lambda tokens: read_heads(config, params, tokens), repeats, [fact])
    assert [(head.stage, head.part, head.layer, head.head, head.key_head) for head in heads] == [
        ("stage0", "encoder", 0, 0, 0), ("stage0", "encoder", 0, 1, 1)]
    assert heads[1].previous > 0.95 and heads[0].previous < 0.2 and heads[1].induction < 0.05
    assert min(nats) > 1
    shown = report(heads, nats, top=1)
    assert shown.count("stage0") == 1 + 3 * 2 and "previous: (stage0 encoder 0,1 1.00)" in shown


def test_nats_and_places_of_layers_come_from_the_model():
    config = HNetConfig(stages=(make_stage(width=16, encoder="t1gru1T2", num_heads=2, rotary_width=8, head_width=8,
                                           feed_forward_width=8, window=9),))
    params = random_params(config)
    tokens = np.arange(40, dtype=np.int32)
    runs, nats = read_heads(config, params, tokens)
    assert [(run.run, run.first_layer, run.queries.shape, run.window) for run in runs] == [
        (0, 0, (1, 40, 2, 8), 9), (2, 2, (2, 40, 2, 8), 9)]
    assert nats.shape == (39,) and (nats > 0).all()


def test_heads_of_stages_within_attend_from_chunk_to_chunk():
    config = one_stage_config()
    params = random_params(config)
    tokens = np.random.RandomState(0).randint(61, size=50).astype(np.int32)
    runs, _ = read_heads(config, params, tokens)
    assert [(run.stage, run.part) for run in runs] == [
        ("stage0", "encoder"), ("stage0", "decoder"), ("stage1", "encoder")]
    outer, _, inner = runs
    assert (outer.slots == np.arange(50)).all()
    steps = np.diff(inner.slots)
    assert inner.slots[0] == 0 and set(steps) == {0, 1}, "a boundary begins the next chunk"


def test_slots_follow_boundaries_through_the_stages():
    class Stage:
        def __init__(self, is_boundary):
            self.boundary_mask = np.array([is_boundary], bool)
            self.is_real, self.boundary_prob = np.ones_like(self.boundary_mask), self.boundary_mask

    slots = token_slots({"stage0": Stage([1, 0, 1, 1, 0, 1]), "stage1": Stage([1, 0, 1, 0])}, 6)
    assert [slots[f"stage{index}"].tolist() for index in range(3)] == [
        [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 2, 3], [0, 0, 0, 1, 1, 1]]


# The command


def test_random_tokens_come_twice_and_differ():
    tokens = repeated_tokens(ByteTokenizer(), 3, 0)
    assert tokens[0] == ByteTokenizer.bos and len(tokens) == 2 * PERIOD + 1
    first, second = tokens[1 : PERIOD + 1], tokens[PERIOD + 1 :]
    assert (first == second).all() and len(set(first)) == PERIOD and ByteTokenizer.bos not in first
    assert not (repeated_tokens(ByteTokenizer(), 3, 1) == tokens).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "bytes"
    stage = make_stage(width=8, encoder="t2", num_heads=2, rotary_width=4)
    config = HNetConfig(stages=(stage,), context_length=700)
    write_run(workdir, config, random_params(config), DataConfig(), source=workdir)
    return workdir


def test_the_command_writes_all_heads_and_prints_the_first(run, tmp_path, capsys):
    command.main(["heads", f"--workdir={run}", "--draws=1", "--length=300", "--top=3", f"--outdir={tmp_path}"])
    record = json.loads((tmp_path / "heads.json").read_text())
    assert [(head["layer"], head["head"], head["run_layer"]) for head in record["heads"]] == [
        (0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)]
    for head in record["heads"]:
        assert all(0 <= head[name] <= 1 for name in ("induction", "previous", "retrieval", "needle"))
    assert record["nats"]["first_copy"] > 0 and record["text"]["documents"] > 50
    printed = capsys.readouterr().out
    best = max(record["heads"], key=lambda head: head["induction"])
    row = f"stage0 +encoder +{best['layer']} +{best['head']} +{best['induction']:.2f} "
    assert re.search(f"induction.*\n{row}", printed)
    assert "of 4 heads above 0.5" in printed


@pytest.mark.parametrize(("arguments", "message"), [
    (["heads", "--length=701"], "--length: 701 tokens are past config.model.context_length 700"),
    (["heads", "--length=100"], "100 tokens have no room for"),
    (["heads", "--top=0"], "--top=0 must be at least 1"),
    (["haeds"], "'haeds' is no analysis; did you mean 'heads'?"),
    ([], "no analysis is named; there is heads"),
])
def test_mistakes_are_refused(run, arguments, message):
    arguments = [*arguments[:1], f"--workdir={run}", *arguments[1:]] if arguments[:1] == ["heads"] else arguments
    with pytest.raises(UsageError, match=re.escape(message)):
        command.main(arguments)


def test_a_run_without_attention_is_refused(tmp_path):
    config = HNetConfig(stages=(make_stage(width=8, encoder="gru1", head_width=8),))
    params = jax.tree.map(jnp.asarray, random_params(config))
    write_run(tmp_path / "gru", config, params, DataConfig(), source=tmp_path)
    with pytest.raises(UsageError, match="has no attention whose heads could be scored"):
        command.main(["heads", f"--workdir={tmp_path / 'gru'}", "--draws=1", "--length=200"])
