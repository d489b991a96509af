"""An experiment on a task trains what is missing, survives what fails, and draws what came out."""
import dataclasses
import json
import re
from pathlib import Path

import pytest

from experiments.config.files import CONFIGS_DIRECTORY, config_from_json, config_to_json, load_config
from experiments.errors import RunError, UsageError
from experiments.tasks import __main__ as command
from experiments.tasks.config import SelectivBenchConfig, TaskConfig
from experiments.tasks.results import Result
from experiments.tasks.settings import settings_of
from experiments.tasks.training import Measured, Trainer
from tests.support.models import make_stack

CONFIGS = CONFIGS_DIRECTORY / "tasks"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("_"))
RATES = (3e-3, 1e30)  # one that learns, one that cannot
CONFIG = """
from experiments.tasks.config import MQARConfig, TaskConfig
from hnet import AttentionConfig, StackConfig

def get_config():
    data = MQARConfig(vocab_size=8, train_lengths=(12, 12), train_pairs=(1, 2), train_shares=(1.0, 3.0),
                      test_lengths=(12, 12), test_pairs=(1, 2))
    stack = StackConfig(width=8, attention=AttentionConfig(num_heads=1))
    return TaskConfig(
        data=data, stack=stack, mixers=("t1",), learning_rates=(3e-3, 1e30), num_steps=8, steps_per_call=2,
        batch_size=4, test_sequences=6, test_batch_size=4)
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


def test_a_run_that_fails_is_reported_and_the_others_go_on(swept, config_path, tmp_path, monkeypatch, capsys):
    def train(trainer, name, manifest, label):
        if name.learning_rate == RATES[0]:
            raise NotImplementedError("not in this test")
        result = json.loads(next((swept / "runs").glob("*rate0.003.json")).read_text())
        fields = dataclasses.asdict(name) | {"curve": [Measured(*each) for each in result["curve"]]}
        return Result(**result | fields)

    monkeypatch.setattr(command, "train", train)
    assert command.main(_arguments(config_path, tmp_path)) == 1
    output = capsys.readouterr().out
    assert output.count("rate 0.003: FAILED: not in this test") == 2
    assert "not finished and left out: t1 all seed 0 rate 0.003, t1 all seed 1 rate 0.003\n" in output


def test_runs_of_another_config_are_not_mixed_in(swept, config_path):
    with pytest.raises(UsageError, match=r"was made with config\.stack\.width 8, and this command asks for 16;"):
        command.main(_arguments(config_path, swept, "--config.stack.width=16"))


def test_other_mixers_and_rates_may_be_added(swept, config_path):
    config = command._config(str(config_path), "t1,t2", ["--config.learning_rates=(3e-3,)"])
    finished = [command.load(run.name, swept, config) is not None for run in command.plan(config, 2)]
    assert finished == [True, True, False, False]


def test_there_is_no_table_of_nothing(config_path, tmp_path):
    with pytest.raises(RunError, match="none of the 4 runs is finished"):
        command.main(_arguments(config_path, tmp_path, "--report_only"))


def test_strings_of_a_grammar_are_learned_from():
    data = SelectivBenchConfig(kinds=("distractors",), alphabets=(4,), depth=2, num_shown=6, first_distractor=0)
    config = TaskConfig(
        data=data, stack=make_stack(16, num_heads=1), mixers=("t1",), num_steps=60,
        steps_per_call=30, batch_size=16, test_sequences=64)
    [setting] = settings_of(config, 0)
    trainer = Trainer(config, "t1", setting)
    (_, first), (state, last) = trainer.train(0, 1e-2)
    assert (first.step, last.step) == (30, 60) and last.loss_nats < 0.8 * first.loss_nats
    shares = trainer.accuracies(state, 0, "test")
    assert list(shares) == ["distractors, 4 symbols"] and shares["distractors, 4 symbols"] > 2 / 9


@pytest.mark.slow
def test_attention_recalls():
    config = load_config("mqar_tiny", [], TaskConfig, directory=CONFIGS)
    config = dataclasses.replace(config, mixers=("t",), num_steps=1000)
    [setting] = settings_of(config, 0)
    trainer = Trainer(config, "t", setting)
    *_, (state, _) = trainer.train(0, config.learning_rates[0])
    assert min(trainer.accuracies(state, 0, "test").values()) > 0.9  # chance is 1 / 32


# Configs


@pytest.mark.parametrize("name", NAMES)
def test_config_loads_round_trips_makes_its_data_and_gives_its_command(name):
    config = load_config(name, [], TaskConfig, directory=CONFIGS)
    assert config_from_json(config_to_json(config), TaskConfig) == config
    names = [column.name for setting in settings_of(config, 0) for column in setting.columns]
    assert len(set(names)) == len(names)
    text = (CONFIGS / f"{name}.py").read_text()
    assert f"python -m experiments.tasks --config={name} --outdir=" in text


@pytest.mark.parametrize(("change", "message"), [
    (["--seeds=0"], "--seeds=0 must be at least 1"),
    (["--config=mqar_tyni"], "no config of that name; did you mean 'mqar_tiny'?"),
    (["--config.num_stepz=1"], "config has no field 'num_stepz'; did you mean 'num_steps'?"),
    (["--config.stack.router=space"], "config.stack has no field 'router'"),
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


