import pytest

from experiments.config.command_line import apply_overrides, split_overrides
from experiments.config.files import config_from_json, config_to_json, load_config
from experiments.errors import UsageError
from tests.support.configs import Config

CONFIG = """
from tests.support.configs import *

def get_config():
    return Config(
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=20, betas=(0.9, 0.95)),
        model=ModelConfig(stages=(StageConfig(width=64),), ratios=(4,)))
"""


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "quickstart.py").write_text(CONFIG)
    (tmp_path / "__init__.py").write_text("")
    return tmp_path


def load(directory, *overrides):
    return load_config("quickstart", list(overrides), Config, directory=directory)


def write_config(directory, body):
    path = directory / "other.py"
    path.write_text(f"from tests.support.configs import *\n{body}\n")
    return str(path)


def test_a_config_is_found_by_name_and_by_path(directory):
    by_name = load(directory)
    by_path = load_config(str(directory / "quickstart.py"), [], Config)
    assert by_name == by_path
    assert by_name.model.stages[0].width == 64


def test_an_unknown_name_is_answered_with_the_nearest_and_all_names(directory):
    with pytest.raises(UsageError, match=r"did you mean 'quickstart'\?; available: quickstart "):
        load_config("quikstart", [], Config, directory=directory)
    with pytest.raises(UsageError, match="no such file"):
        load_config(str(directory / "quikstart.py"), [], Config, directory=directory)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1000", 1000),
        ("seed=1e3", 1000),
        ("seed=-1", -1),
        ("optimizer.peak_lr=3", 3.0),
        ("optimizer.peak_lr=2e-4", 2e-4),
        ("optimizer.rule=paper", "paper"),
        ("is_tied=false", False),
        ("is_tied=0", False),
        ("is_tied=True", True),
        ("dtype=float32", "float32"),
        ("dtype=a=b", "a=b"),
        ("dtype=", ""),
        ("dtype=none", "none"),
        ("model.ratios=(2,3)", (2, 3)),
        ("model.ratios=()", ()),
        ("model.names=('a',1)", ("a", 1)),
        ("optimizer.betas=(1,0.5)", (1.0, 0.5)),
        ("model.stages.stage0.width=128", 128),
        ("model.stages.stage0.window=7", 7),
        ("model.stages.stage0.window=none", None),
        ("model.inner=none", None),
    ],
)
def test_a_value_takes_the_type_of_its_annotation(directory, override, expected):
    value = load(directory, f"--config.{override}")
    for key in override.split("=")[0].split("."):
        value = value[0] if key == "stage0" else getattr(value, key)
    assert value == expected
    assert type(value) is type(expected)
    assert not isinstance(value, tuple) or [type(x) for x in value] == [type(x) for x in expected]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1.5", r"--config\.seed=1\.5: an int is wanted; the default is 0"),
        ("seed=1e400", "an int is wanted"),
        ("seed=", "an int is wanted"),
        ("seed=none", "an int is wanted"),
        ("optimizer.peak_lr=fast", "a finite float is wanted; the default is 0.001"),
        ("optimizer.peak_lr=nan", "a finite float is wanted"),
        ("optimizer.rule=papier", "rule 'papier' is not one of equal, paper; did you mean 'paper'"),
        ("is_tied=yes", "a bool is wanted, true or false"),
        ("model.ratios=4", r"a tuple of int is wanted, such as '\(1, 2\)'"),
        ("model.ratios=(2,3.5)", "its elements must be int, and 3.5 is not"),
        ("model.ratios=(True,)", "its elements must be int, and True is not"),
        ("model.stages.stage0.window=x", "an int is wanted, or none; the default is None"),
        ("model.stages.stage0.width=0", r"config\.model\.stages\.stage0: width 0 must be at least 1"),
        ("optimizer.betas=(1e999,)", "its elements must be float, and inf is not"),
        ("model.ratios=__import__('os')", "a tuple of int is wanted"),
        ("optimizer=3", r"a group of fields; set one of them: peak_lr, warmup_steps, betas, rule"),
        ("model.stages=3", r"a group of fields; set one of them: stage0"),
        ("model.inner=3", r"a group of fields; set one of them: stages, ratios"),
        ("seed.x=3", "config.seed is 0 and has no fields below it"),
        ("optimizer.peek_lr=3", "no field 'peek_lr'; did you mean 'peak_lr'.*peak_lr, warmup_steps, betas"),
        ("optimiser.peak_lr=3", "config has no field 'optimiser'; did you mean 'optimizer'"),
        ("model.stages.stage1.width=3", "config.model.stages has no field 'stage1'"),
        ("peak_lr=3", "config has no field 'peak_lr'; did you mean 'optimizer.peak_lr'"),
        ("shape=sqare", "shape 'sqare' is not one of circle, square; did you mean 'square'"),
        ("shape=square", "the fields of data are those of 'circle'; load a config that has 'square'"),
        ("data.side=3", "config.data has no field 'side'; its fields: radius"),
        ("extras.blue.x=3", "config.extras has no field 'blue'; its fields: red, green"),
    ],
)
def test_a_wrong_override_is_refused_by_field(directory, override, message):
    with pytest.raises(UsageError, match=message):
        load(directory, f"--config.{override}")


def test_a_group_that_is_none_or_missing_begins_with_its_defaults(directory):
    config = load(directory, "--config.model.inner.ratios=(7,)", "--config.model.inner.inner.names=('x',)",
                  "--config.extras.green.hue=3", "--config.shape=circle", "--config.data.radius=2")
    assert config.model.inner.ratios == (7,) and config.model.inner.inner.names == ("x",)
    assert [(type(extra).__name__, extra.hue) for extra in config.extras] == [("Green", 3)]
    assert config.data.radius == 2.0


def test_fields_are_set_all_at_once_and_need_to_fit_only_together(directory):
    assert load(directory, "--config.low=5", "--config.high=9").low == 5
    with pytest.raises(UsageError, match="config: low 5 is above high 1"):
        load(directory, "--config.low=5")


def test_overrides_are_split_from_the_other_arguments_in_either_spelling(directory):
    argv = ["--config=quickstart", "--config.seed", "-4", "--workdir=runs/x", "--config.dtype=f=g"]
    others, overrides = split_overrides(argv)
    assert others == ["--config=quickstart", "--workdir=runs/x"]
    assert overrides == ["--config.seed=-4", "--config.dtype=f=g"]
    assert load(directory, "--config.seed", "5").seed == 5
    for argv in (["--config.seed"], ["--config.seed", "--workdir=x"]):
        with pytest.raises(UsageError, match=r"--config\.seed needs a value"):
            split_overrides(argv)
    with pytest.raises(UsageError, match="'seed=3' sets no config field"):
        load(directory, "seed=3")


def test_overriding_leaves_the_config_it_started_from_alone(directory):
    config = load(directory)
    assert apply_overrides(config, ["--config.seed=9"]).seed == 9
    assert config.seed == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", r"has no function get_config\(\)"),
        ("def get_config():\n    return {}", "must return a Config, not a dict"),
        ("def get_config():\n    return StageConfig(width=3)", "must return a Config, not a StageConfig"),
        ("def get_config():\n    raise ValueError('must\\n not shrink')", "ValueError: must not"),
        ("def get_config(:", "SyntaxError"),
        ("def get_config():\n    return Config(model=ModelConfig(ratios=[1]))", r"model\.ratios is \[1\]; a tup"),
        ("def get_config():\n    return Config(seed=None)", "config.seed is None; a value of type int is wanted"),
        ("def get_config():\n    return Config(seed=True)", "config.seed is True; a value of type int"),
        ("def get_config():\n    return Config(model=ModelConfig(ratios=(1, (2,))))", r"ratios is \(2,\); a"),
        ("def get_config():\n    return Config(optimizer=OptimizerConfig(peak_lr=float('inf')))", "be finite"),
        ("def get_config():\n    return Config(optimizer=OptimizerConfig(rule='no'))", "rule 'no' is not one of"),
        ("def get_config():\n    return Config(data=3)", "config.data has a int; it may be Circle, Square"),
    ],
)
def test_a_file_that_gives_no_usable_config_is_refused_in_one_line(directory, body, message):
    with pytest.raises(UsageError, match=message) as refusal:
        load_config(write_config(directory, body), [], Config)
    assert "\n" not in str(refusal.value)


def test_json_gives_back_the_same_config(directory):
    config = load(directory, "--config.optimizer.peak_lr=0.1", "--config.optimizer.betas=(1,0.3)",
                  "--config.model.inner.inner.ratios=(3,)", "--config.extras.red.hue=4")
    again = config_from_json(config_to_json(config), Config)
    assert again == config and hash(again) == hash(config)
    assert config_to_json(again) == config_to_json(config)
    assert again.optimizer.betas == (1.0, 0.3) and again.model.names == ()
    assert type(again.optimizer.betas[0]) is float and type(again.seed) is int
