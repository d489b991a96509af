"""An experiment on a task trains what is missing and draws what came out; splits share no sequence."""
import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config_loading import CONFIGS_DIRECTORY, config_from_json, config_to_json, load_config
from experiments.errors import RunError, UsageError
from experiments.tasks import __main__ as command
from experiments.tasks.config import MQARConfig, SelectivBenchConfig, TaskConfig
from experiments.tasks.examples import SPLITS, sample_batch, split_key
from experiments.tasks.model import TaskModel
from experiments.tasks.mqar import MQAR
from experiments.tasks.page import choose_rates, render_plot, render_table
from experiments.tasks.results import Result
from experiments.tasks.settings import Column, Setting, settings_of
from experiments.tasks.training import Measured, Trainer
from hnet import StageConfig

NAMES = sorted(path.stem for path in (CONFIGS_DIRECTORY / "tasks").glob("*.py") if not path.stem.startswith("_"))
RATES = (3e-3, 1e30)  # one that learns, one that cannot
CONFIG = """
from experiments.tasks.config import MQARConfig, TaskConfig
from hnet import StageConfig

def get_config():
    data = MQARConfig(vocab_size=8, train_lengths=(12, 12), train_pairs=(1, 2), train_shares=(1.0, 3.0),
                      test_lengths=(12, 12), test_pairs=(1, 2))
    stage = StageConfig(width=8, encoder="", decoder="", num_heads=1)
    return TaskConfig(
        data=data, stage=stage, mixers=("t1",), learning_rates=(3e-3, 1e30), num_steps=8, steps_per_call=2,
        batch_size=4, test_sequences=6, test_batch_size=4).to_config_dict()
"""


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def swept(config_path, tmp_path_factory) -> Path:
    """The outdir of four finished runs."""
    outdir = tmp_path_factory.mktemp("sweep")
    assert command.main(_arguments(config_path, outdir)) == 0
    return outdir


def _arguments(config: Path, outdir: Path, *more: str) -> list[str]:
    return [f"--config={config}", f"--outdir={outdir}", "--seeds=2", *more]


# Training


def test_every_rate_and_seed_has_a_file_and_the_table_shows_the_best(swept):
    paths = sorted(path.name for path in (swept / "runs").iterdir())
    assert paths == [f"t1-all-seed{seed}-rate{rate}.json" for seed in (0, 1) for rate in ("0.003", "1e+30")]
    records = json.loads((swept / "results.json").read_text())
    assert [(each["seed"], each["learning_rate"]) for each in records] == [
        (seed, rate) for seed in (0, 1) for rate in RATES]
    for record in records:
        assert list(record["test"]) == list(record["validation"]) == ["1 pairs in 12", "2 pairs in 12"]
        if record["learning_rate"] == RATES[1]:
            assert record["diverged_at"] > 0 and not any(record["test"].values())
        else:
            assert [step for step, *_ in record["curve"]] == [2, 4, 6, 8] and record["diverged_at"] == 0
    assert re.search(r"^\| t1 +\| 0\.003 +\| 2 ", (swept / "table.md").read_text(), re.M)


def test_the_same_command_trains_only_what_is_missing_and_comes_to_the_same(swept, config_path, capsys):
    name = "t1-all-seed1-rate0.003.json"
    before = json.loads((swept / "runs" / name).read_text())
    (swept / "runs" / name).unlink()
    assert command.main(_arguments(config_path, swept)) == 0
    output = capsys.readouterr().out
    assert output.count(": finished before, ") == 3 and output.count(": started, ") == 1
    assert "[1/4] t1 all seed 0 rate 0.003: finished before, 1 pairs in 12 " in output
    assert "seed 0 rate 1e+30: finished before, diverged by step " in output
    after = json.loads((swept / "runs" / name).read_text())
    for field in ("validation", "test", "curve", "num_params", "config"):
        assert after[field] == before[field]


def test_report_only_draws_the_same(swept, config_path, monkeypatch):
    files = {name: (swept / name).read_text() for name in ("results.json", "table.md", "plot.svg")}
    monkeypatch.setattr(command, "train_all", None)
    assert command.main(_arguments(config_path, swept, "--report_only")) == 0
    assert {name: (swept / name).read_text() for name in files} == files


def test_a_run_that_fails_is_reported_and_the_others_go_on(config_path, tmp_path, monkeypatch, capsys):
    def train(trainer, name, manifest, label):
        if name.learning_rate == RATES[0]:
            raise NotImplementedError("not in this test")
        return _result(name.mixer, name.seed, name.learning_rate, 0.5, 0.5)

    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "_columns", lambda runs: COLUMNS)
    assert command.main(_arguments(config_path, tmp_path)) == 1
    output = capsys.readouterr().out
    assert output.count("rate 0.003: FAILED: not in this test") == 2
    assert "not finished and left out: t1 all seed 0 rate 0.003, t1 all seed 1 rate 0.003\n" in output


def test_runs_of_another_config_are_not_mixed_in(swept, config_path):
    with pytest.raises(UsageError, match=r"was made with config\.stage\.width 8, and this command asks for 16;"):
        command.main(_arguments(config_path, swept, "--config.stage.width=16"))


def test_other_mixers_and_rates_may_be_added(swept, config_path):
    config = command._config(str(config_path), "t1,t2", ["--config.learning_rates=(3e-3,)"])
    finished = [command.load(run.name, swept, config) is not None for run in command.plan(config, 2)]
    assert finished == [True, True, False, False]


def test_there_is_no_table_of_nothing(config_path, tmp_path):
    with pytest.raises(RunError, match="none of the 4 runs is finished"):
        command.main(_arguments(config_path, tmp_path, "--report_only"))


def test_strings_of_a_grammar_are_learned_from(monkeypatch):
    data = SelectivBenchConfig(kinds=("distractors",), alphabets=(4,), depth=2, num_shown=6, first_distractor=0)
    config = TaskConfig(
        data=data, stage=StageConfig(width=16, encoder="", decoder="", num_heads=1), mixers=("t1",), num_steps=60,
        steps_per_call=30, batch_size=16, test_sequences=64)
    [setting] = settings_of(config, 0)
    trainer = Trainer(config, "t1", setting)
    (_, first), (state, last) = trainer.train(0, 1e-2)
    assert (first.step, last.step) == (30, 60) and last.loss_nats < 0.8 * first.loss_nats
    shares = trainer.accuracies(state, 0, "test")
    assert list(shares) == ["distractors, 4 symbols"] and shares["distractors, 4 symbols"] > 2 / 9


@pytest.mark.slow
def test_attention_recalls():
    fields = load_config("mqar_tiny", [], directory=CONFIGS_DIRECTORY / "tasks").to_dict()
    config = TaskConfig.from_config_dict(fields | {"mixers": ("t",)})
    [setting] = settings_of(config, 0)
    trainer = Trainer(config, "t", setting)
    *_, (state, _) = trainer.train(0, config.learning_rates[0])
    assert min(trainer.accuracies(state, 0, "test").values()) > 0.9  # chance is 1 / 32


# Data


def test_splits_seeds_and_batches_share_no_sequence():
    draw = jax.jit(lambda key, index: sample_batch((MQAR(64, 16, 4),), 0, key, index, 20).inputs)
    batches = [draw(split_key(seed, split, source), index)
               for seed in (0, 1) for split in SPLITS for source in (0, 1) for index in (0, 1)]
    sequences = {sequence.tobytes() for batch in batches for sequence in np.asarray(batch)}
    assert len(sequences) == 20 * len(batches) == 20 * 32
    assert (draw(split_key(1, "test", 1), 1) == batches[-5]).all()


def test_sources_of_one_length_are_padded_to_the_most_questions():
    sources, key = (MQAR(64, 16, 4), MQAR(64, 16, 1)), split_key(0, "train")
    full, padded, alone = jax.jit(lambda: (
        sample_batch(sources, 0, key, 0, 3), sample_batch(sources, 1, key, 0, 3),
        sample_batch(sources[1:], 0, key, 0, 3)))()
    assert (full.labels >= 32).all()
    assert (padded.labels[:, :1] == alone.labels).all() and (padded.labels[:, 1:] == -1).all()
    assert (padded.inputs == alone.inputs).all() and (padded.positions[:, :1] == alone.positions).all()


def test_every_start_of_training_draws_from_sources_by_their_shares():
    setting = Setting("x", (None,) * 3, (5.0, 1.0, 2.0), (), 1, 1)
    drawn = np.array([setting.source_of(call) for call in range(160)])
    for length in (8, 40, 160):
        counts = np.bincount(drawn[:length], minlength=3)
        np.testing.assert_allclose(counts, np.array([5, 1, 2]) * length / 8, atol=1)


def test_selectivbench_has_the_settings_and_columns_of_its_kinds():
    data = SelectivBenchConfig(alphabets=(4, 5), depth=2, longer_gaps=(7,))
    config = TaskConfig(data=data, stage=StageConfig(width=8, encoder="", decoder=""), mixers=("m",))
    columns = {setting.name: [column.name for column in setting.columns] for setting in settings_of(config, 0)}
    assert columns["gaps5"] == ["gaps, 5 symbols", "gaps of 7, 5 symbols"]
    kinds = ("complexity", "gaps", "distractors")
    assert list(columns) == [f"{kind}{symbols}" for symbols in (4, 5) for kind in kinds]
    only = dataclasses.replace(data, kinds=("generalisation",), alphabets=(4,))
    [setting] = settings_of(dataclasses.replace(config, data=only), 0)
    trained, [tested] = setting.sources[0], setting.columns
    assert trained.gaps == (1, 10) and tested.source.gaps == (7, 7) and tested.source.noise == trained.noise == 0.2


def test_one_model_per_kind_is_tested_on_its_own_kind():
    data = MQARConfig(
        one_model=False, train_lengths=(64, 128), train_pairs=(4, 8), train_shares=(1.0, 1.0),
        test_lengths=(64, 128), test_pairs=(4, 8))
    settings = settings_of(TaskConfig(
        data=data, stage=StageConfig(width=8, encoder="", decoder=""), mixers=("m",)), 0)
    assert [setting.name for setting in settings] == ["64x4", "128x8"]
    assert all(setting.sources == (setting.columns[0].source,) for setting in settings)


# Configs


@pytest.mark.parametrize("name", NAMES)
def test_config_loads_round_trips_makes_its_data_and_gives_its_command(name):
    config_dict = load_config(name, ["--config.mixers=('t','T','m')"], directory=CONFIGS_DIRECTORY / "tasks")
    config = TaskConfig.from_config_dict(config_dict)
    assert config.to_config_dict().to_dict() == config_dict.to_dict()
    assert TaskConfig.from_config_dict(config_from_json(config_to_json(config_dict))) == config
    names = [column.name for setting in settings_of(config, 0) for column in setting.columns]
    assert len(set(names)) == len(names)
    text = (CONFIGS_DIRECTORY / "tasks" / f"{name}.py").read_text()
    assert f"python -m experiments.tasks --config={name} --outdir=" in text


@pytest.mark.parametrize(("change", "message"), [
    (["--seeds=0"], "--seeds=0 must be at least 1"),
    (["--config=mqar_tyni"], "no config of that name; did you mean 'mqar_tiny'?"),
    (["--config.num_stepz=1"], "config has no field 'num_stepz'; did you mean 'num_steps'?"),
    (["--config.stage.router=space"], "config.stage has no field 'router'"),
    (["--config.task=mqr"], "task 'mqr' is not one of mqar, selectivbench; did you mean 'mqar'?"),
    (["--config.num_steps=9"], "num_steps 9 is not a multiple of steps_per_call 2"),
    (["--config.learning_rates=(0.0,)"], "learning_rates (0.0,) must be one or more different numbers above 0"),
    (["--config.schedule=linear"], "schedule 'linear' is not one of wsd, wsd_inverse_sqrt, cosine"),
    (["--config.data.train_pairs=(1,)"], "one value per kind of batch; they have 2, 1 and 2"),
    (["--config.data.test_pairs=(1, 9)"], "config.data: 9 pairs do not fit into 12 tokens"),
    (["--config.data.one_model=false", "--config.data.test_pairs=(1,1)"], "each model on what it was trained on"),
    (["--mixers=t,x"], "mixer 'x': layout 'x2' must be"),
    (["--mixers=t,t"], "mixers ('t', 't') must be one or more different layouts"),
])
def test_a_command_is_refused_before_it_trains(config_path, tmp_path, change, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        command.main(_arguments(config_path, tmp_path / "out", *change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fields", "message"), [
    (dict(kinds=("gap",)), "data.kinds 'gap' is not one of complexity, gaps, distractors, generalisation"),
    (dict(target="symbol"), "data.target 'symbol' is not one of state, next_symbol"),
    (dict(gaps=(3, 1)), "data.gaps (3, 1) must be two numbers of steps, fewest and most"),
    (dict(alphabets=()), "must not be empty"),
    (dict(distractor_probability=1.5), "data.distractor_probability 1.5 must be from 0 to 1"),
    (dict(noise=-0.1), "must not be negative"),
    (dict(num_shown=0), "data.num_shown 0 must be at least 1"),
])
def test_impossible_strings_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SelectivBenchConfig(**fields)


# The page

COLUMNS = [Column("4 pairs", "recall", 4, None), Column("8 pairs", "recall", 8, None),
           Column("noise, 3 symbols", "noise", 3, None)]


def _result(mixer: str, seed: int, rate: float, validation: float, test: float) -> Result:
    def shares(value: float) -> dict[str, float]:
        return {column.name: value - 0.1 * index for index, column in enumerate(COLUMNS)}

    return Result(
        mixer=mixer, setting="all", seed=seed, learning_rate=rate, validation=shares(validation),
        test=shares(test), curve=[Measured(10, 2.0, 0.1), Measured(20, 1.0, test)], diverged_at=0,
        num_params=49_600, train_seconds=61.0 + seed, commit="90e4ef8abc", is_dirty=False, device="cpu",
        versions={"jax": "0.10.2", "python": "3.11.7"}, config={})


RESULTS = [
    _result("t", 0, 1e-3, 0.9, 0.8), _result("t", 1, 1e-3, 0.9, 0.9),
    _result("t", 0, 1e-2, 0.8, 0.99), _result("t", 1, 1e-2, 0.8, 0.99),  # better on the test alone
    _result("m", 0, 1e-3, 0.99, 0.99),                                   # its other seed is not finished
    _result("m", 0, 1e-2, 0.5, 0.6), _result("m", 1, 1e-2, 0.5, 0.4),
]


def test_rates_are_chosen_on_the_validation_split_among_those_with_all_seeds():
    chosen = choose_rates(RESULTS)
    assert {mixer: [(run.seed, run.learning_rate) for run in runs] for mixer, runs in chosen.items()} == {
        "t": [(0, 1e-3), (1, 1e-3)], "m": [(0, 1e-2), (1, 1e-2)]}


def test_the_table_has_a_row_per_mixer_and_says_what_its_numbers_are():
    header, _, *rows, empty, footnote = render_table(choose_rates(RESULTS), COLUMNS).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (header, *rows)]
    assert cells == [
        ["mixer", "rate", "seeds", "4 pairs", "8 pairs", "noise, 3 symbols", "parameters", "seconds"],
        ["t", "0.001", "2", "85.0 ± 7.1", "75.0 ± 7.1", "65.0 ± 7.1", "49.6k", "62"],
        ["m", "0.01", "2", "50.0 ± 14.1", "40.0 ± 14.1", "30.0 ± 14.1", "49.6k", "62"]]
    assert empty == "" and "on validation sequences" in footnote
    assert footnote.endswith("cpu, Python 3.11.7, jax 0.10.2, commit 90e4ef8.")


def test_the_plot_has_a_panel_per_kind_of_column_and_one_of_training():
    root = ET.fromstring(render_plot(choose_rates(RESULTS), COLUMNS))
    panels = root.findall("{http://www.w3.org/2000/svg}svg")
    texts = [[text.text for text in panel.iter("{http://www.w3.org/2000/svg}text")] for panel in panels]
    expected = [{"t 75.0", "m 40.0"}, {"t 65.0 ± 7.1", "m 30.0 ± 14.1"}, {"t 85.0", "m 50.0"}]
    assert len(texts) == 3 and all(labels <= set(panel) for labels, panel in zip(expected, texts, strict=True))


def test_mixers_past_the_sixth_are_dashed():
    results = [_result(f"t{index}", 0, 1e-3, 0.9, 0.5 + index / 20) for index in range(1, 9)]
    kinds = [path.get("class") for path in ET.fromstring(render_plot(choose_rates(results), COLUMNS)).iter()
             if "line" in (path.get("class") or "") and path.tag.endswith("path")]
    assert "line c0" in kinds and "line c0 dashed" in kinds and "line c2 dashed" not in kinds


def test_a_run_without_a_call_that_was_finite_has_no_curve():
    diverged = dataclasses.replace(_result("m", 0, 1e-3, 0.0, 0.0), curve=[], diverged_at=2)
    assert "in training" in render_plot(choose_rates([diverged, RESULTS[0]]), COLUMNS)
    assert "in training" not in render_plot(choose_rates([diverged]), COLUMNS)


def test_logits_at_positions_are_those_of_these_steps():
    model = TaskModel(StageConfig(width=8, encoder="t1", decoder="", num_heads=1), 8, 8, conv_taps=2)
    inputs = jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32)

    @jax.jit
    def logits():
        params = model.init(jax.random.key(0), *inputs)
        return model.apply(params, *inputs), model.apply(params, *inputs, jnp.array([[4, 1]]))

    everywhere, there = logits()
    np.testing.assert_allclose(there, everywhere[:, [4, 1]], atol=1e-6)
    assert np.ptp(everywhere, axis=1).min() > 0
