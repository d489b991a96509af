"""Configs that earlier versions saved are read as the configs of today."""
import json
from pathlib import Path

import pytest

from experiments.config import RunConfig
from experiments.config.files import (
    CONFIGS_DIRECTORY,
    config_from_json,
    config_from_saved,
    load_config,
    saved_fields,
)
from experiments.errors import UsageError
from experiments.tasks.config import TaskConfig
from experiments.tasks.results import RunName, load

ROOT = Path(__file__).parents[3]
SAVED = sorted((ROOT / "tests" / "data" / "frozen" / "configs").glob("*.json"), key=lambda path: path.stem)
RESULTS = [ROOT / "docs" / "benchmarks" / f"{name}_cpu.json" for name in ("mqar_tiny", "selectivbench_tiny")]


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_every_config_of_format_1_is_that_of_today(path):
    if path.stem.startswith("tasks_"):
        kind, name, directory = TaskConfig, path.stem.removeprefix("tasks_"), CONFIGS_DIRECTORY / "tasks"
    else:
        kind, name, directory = RunConfig, path.stem, CONFIGS_DIRECTORY
    assert "format" not in json.loads(path.read_text())
    assert config_from_json(path.read_text(), kind) == load_config(name, [], kind, directory=directory)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_belong_to_the_config_of_today(path, tmp_path):
    config = load_config(path.stem.removesuffix("_cpu"), [], TaskConfig, directory=CONFIGS_DIRECTORY / "tasks")
    for fields in json.loads(path.read_text()):
        name = RunName(fields["mixer"], fields["setting"], fields["seed"], fields["learning_rate"])
        name.path(tmp_path).parent.mkdir(exist_ok=True)
        name.path(tmp_path).write_text(json.dumps(fields))
        assert load(name, tmp_path, config).test == fields["test"]


def test_a_window_of_minus_one_and_an_empty_boundary_lm_are_none():
    fields = json.loads(next(path for path in SAVED if path.stem == "blt_tiny_stdlib").read_text())
    model = config_from_saved(fields, RunConfig).model
    assert [stage.stack.attention.window for stage in model.stages] == [63, None]
    assert model.boundary_lm.boundary_lm is None and model.boundary_lm.stages[0].stack.attention.window == 63


def test_what_is_saved_today_says_its_format_and_a_later_one_is_refused():
    config = load_config("quickstart", [], RunConfig)
    fields = saved_fields(config)
    assert fields["format"] == 2 and config_from_saved(fields, RunConfig) == config
    with pytest.raises(UsageError, match="saved in format 3, and this version knows formats up to 2"):
        config_from_saved(fields | {"format": 3}, RunConfig)


@pytest.mark.parametrize(("change", "message"), [
    (lambda fields: fields.update(sed=1), "config has no field 'sed'; did you mean 'seed'"),
    (lambda fields: fields["model"]["stages"]["stage1"].update(widht=1), "no field 'widht'; did you mean"),
    (lambda fields: fields["model"]["stages"].update(stage7={}), "must be named stage0, stage1, stage2;"),
    (lambda fields: fields.pop("model"), "config has no field 'model', without which there is no RunConfig"),
    (lambda fields: fields.update(seed="1"), "config.seed is '1'; a value of type int is wanted"),
    (lambda fields: fields.update(model=3), "config.model is 3; the fields of a HNetConfig are wanted"),
])
def test_damaged_files_are_refused_by_field(change, message):
    fields = json.loads(json.dumps(saved_fields(load_config("quickstart", [], RunConfig))))
    change(fields)
    with pytest.raises(UsageError, match=message):
        config_from_saved(fields, RunConfig)
