"""Every config in configs/ loads, describes a model, and says in its docstring how to run it."""
import ast

import jax
import pytest

from experiments.config import RunConfig
from experiments.config_loading import CONFIGS_DIRECTORY, config_from_json, config_to_json, load_config
from hnet import parameter_shapes

NAMES = sorted(path.stem for path in CONFIGS_DIRECTORY.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_config_loads_round_trips_and_describes_a_model(name):
    config = load_config(name, [])
    run = RunConfig.from_config_dict(config)
    assert run.to_config_dict().to_dict() == config.to_dict()
    assert RunConfig.from_config_dict(config_from_json(config_to_json(config))) == run
    assert sum(shape.size for shape in jax.tree.leaves(parameter_shapes(run.model))) > 0


@pytest.mark.parametrize("name", NAMES)
def test_docstring_gives_the_command(name):
    docstring = ast.get_docstring(ast.parse((CONFIGS_DIRECTORY / f"{name}.py").read_text()))
    assert f"--config={name} " in docstring


def test_the_quick_start_has_about_half_a_million_parameters():
    run = RunConfig.from_config_dict(load_config("quickstart", []))
    count = sum(shape.size for shape in jax.tree.leaves(parameter_shapes(run.model)))
    assert 400_000 < count < 700_000
