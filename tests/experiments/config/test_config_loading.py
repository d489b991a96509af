import pytest

from experiments.config.files import (
    apply_overrides,
    config_from_json,
    config_to_json,
    load_config,
    split_overrides,
)
from experiments.errors import UsageError

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict({"seed": 0, "dtype": "bfloat16", "is_tied": True})
    c.optimizer = dict(peak_lr=1e-3, warmup_steps=20, betas=(0.9, 0.95))
    c.model = {"stages": {"stage0": {"width": 64}}, "ratios": (4,), "nothing": ()}
    return c
"""


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "quickstart.py").write_text(CONFIG)
    (tmp_path / "__init__.py").write_text("")
    return tmp_path


def load(directory, *overrides):
    return load_config("quickstart", list(overrides), directory=directory)


def write_config(directory, body):
    path = directory / "other.py"
    path.write_text(f"from ml_collections import ConfigDict\n{body}\n")
    return str(path)


def test_a_config_is_found_by_name_and_by_path(directory):
    by_name = load(directory)
    by_path = load_config(str(directory / "quickstart.py"), [])
    assert by_name == by_path
    assert by_name.model.stages.stage0.width == 64


def test_an_unknown_name_is_answered_with_the_nearest_and_all_names(directory):
    with pytest.raises(UsageError, match=r"did you mean 'quickstart'\?; available: quickstart "):
        load_config("quikstart", [], directory=directory)
    with pytest.raises(UsageError, match="no such file"):
        load_config(str(directory / "quikstart.py"), [], directory=directory)


def test_the_config_is_locked_at_every_level(directory):
    config = load(directory, "--config.seed=3")
    with pytest.raises(AttributeError):
        config.sed = 1
    with pytest.raises(AttributeError):
        config.model.stages.stage0.widht = 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1000", 1000),
        ("seed=1e3", 1000),
        ("seed=-1", -1),
        ("optimizer.peak_lr=3", 3.0),
        ("optimizer.peak_lr=2e-4", 2e-4),
        ("is_tied=false", False),
        ("is_tied=0", False),
        ("is_tied=True", True),
        ("dtype=float32", "float32"),
        ("dtype=a=b", "a=b"),
        ("dtype=", ""),
        ("model.ratios=(2,3)", (2, 3)),
        ("model.ratios=()", ()),
        ("model.nothing=('a',1)", ("a", 1)),
        ("optimizer.betas=(1,0.5)", (1.0, 0.5)),
        ("model.stages.stage0.width=128", 128),
    ],
)
def test_a_value_takes_the_type_of_the_default(directory, override, expected):
    config = load(directory, f"--config.{override}")
    value = config
    for key in override.split("=")[0].split("."):
        value = value[key]
    assert value == expected
    assert type(value) is type(expected)
    assert not isinstance(value, tuple) or [type(x) for x in value] == [type(x) for x in expected]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1.5", r"--config\.seed=1\.5: an int is wanted; the default is 0"),
        ("seed=1e400", "an int is wanted"),
        ("seed=", "an int is wanted"),
        ("optimizer.peak_lr=fast", "a finite float is wanted; the default is 0.001"),
        ("optimizer.peak_lr=nan", "a finite float is wanted"),
        ("is_tied=yes", "a bool is wanted, true or false"),
        ("model.ratios=4", r"a tuple of int is wanted, such as '\(1, 2\)'"),
        ("model.ratios=(2,3.5)", "its elements must be int, and 3.5 is not"),
        ("model.ratios=(True,)", "its elements must be int, and True is not"),
        ("optimizer.betas=(1e999,)", "its elements must be float, and inf is not"),
        ("model.ratios=__import__('os')", "a tuple of int is wanted"),
        ("optimizer=3", r"a group of fields; set one of them: betas, peak_lr, warmup_steps"),
        ("seed.x=3", "config.seed is 0 and has no fields below it"),
        ("optimizer.peek_lr=3", "no field 'peek_lr'; did you mean 'peak_lr'.*betas, peak_lr, warmup_steps"),
        ("optimiser.peak_lr=3", "config has no field 'optimiser'; did you mean 'optimizer'"),
        ("model.stages.stage1.width=3", "config.model.stages has no field 'stage1'"),
    ],
)
def test_a_wrong_override_is_refused_by_field(directory, override, message):
    with pytest.raises(UsageError, match=message):
        load(directory, f"--config.{override}")


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
        ("def get_config():\n    return {}", "must return a ConfigDict, not a dict"),
        ("def get_config():\n    raise ValueError('must\\n not shrink')", "ValueError: must not"),
        ("def get_config(:", "SyntaxError"),
        ("def get_config():\n    return ConfigDict({'a': {'b': [1]}})", r"config\.a\.b is \[1\].*a tuple"),
        ("def get_config():\n    return ConfigDict({'a': None})", "config.a is None.*use 0"),
        ("def get_config():\n    return ConfigDict({'a': (1, (2,))})", "config.a is"),
        ("def get_config():\n    return ConfigDict({'a': float('inf')})", "must be finite"),
    ],
)
def test_a_file_that_gives_no_usable_config_is_refused_in_one_line(directory, body, message):
    with pytest.raises(UsageError, match=message) as refusal:
        load_config(write_config(directory, body), [])
    assert "\n" not in str(refusal.value)


def test_json_gives_back_the_same_config(directory):
    config = load(directory, "--config.optimizer.peak_lr=0.1", "--config.optimizer.betas=(1,0.3)")
    again = config_from_json(config_to_json(config))
    assert again == config
    assert config_to_json(again) == config_to_json(config)
    assert again.optimizer.betas == (1.0, 0.3) and again.model.nothing == ()
    assert type(again.optimizer.betas[0]) is float and type(again.seed) is int
    with pytest.raises(AttributeError):
        again.new_field = 1
