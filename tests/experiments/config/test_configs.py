"""Every config in configs/ loads, describes a model, and says in its docstring how to run it."""
import ast
import json
import shutil

import jax
import pytest

from experiments.config import RunConfig
from experiments.config.files import config_from_json, config_to_json, configs_in, load_config
from hnet import parameter_shapes, to_official_json

FILES = {name: path for name, path in configs_in().items() if path.parent.name != "tasks"}
NAMES = sorted(FILES)
# Millions of parameters: of ours, about; of the paper's (arXiv 2507.07955), as it tells.
OURS = {"quickstart": 0.5, "megabyte_tiny_stdlib": 0.5, "spacebyte_tiny_stdlib": 0.5, "aunet_tiny_stdlib": 0.5,
        "blt_tiny_stdlib": 0.5, "blt_boundary_lm_tiny_stdlib": 0.1}
PAPER = {"hnet_1stage_l": 680, "hnet_2stage_l": 870, "hnet_1stage_xl": 1300, "hnet_2stage_xl": 1600,
         "llamabyte_l": 210, "mambabyte_l": 190, "spacebyte_l": 570, "hnet_space_l": 850, "hnet_pool_l": 850}
RELEASED = {  # config -> layout, widths, feed-forward widths and rotary widths of the release
    "hnet_1stage_l": (["m4", ["T22"], "m4"], [1024, 1536], [0, 4096], [32, 48]),
    "hnet_1stage_xl": (["m4", ["T24"], "m4"], [1024, 2048], [0, 5504], [32, 64]),
    "hnet_2stage_l": (["m4", ["T1m4", ["T26"], "m4T1"], "m4"], [1024, 1024, 1536], [0, 2816, 4096], [32, 32, 48]),
    "hnet_2stage_xl": (["m4", ["T1m4", ["T27"], "m4T1"], "m4"], [1024, 1536, 2048], [0, 4096, 5504], [32, 48, 64]),
    "hnet_2stage_xl_chinese": (
        ["m4", ["T1m4", ["T30"], "m4T1"], "m4"], [1024, 1536, 2048], [0, 4096, 5504], [32, 48, 64]),
    "hnet_2stage_xl_code": (
        ["m4", ["T1m4", ["T28"], "m4T1"], "m4"], [1024, 1536, 2048], [0, 4096, 5504], [32, 48, 64]),
}


def _run(name: str) -> RunConfig:
    return load_config(name, [], RunConfig)


def _millions(run: RunConfig) -> float:
    return sum(shape.size for shape in jax.tree.leaves(parameter_shapes(run.model))) / 1e6


@pytest.mark.parametrize("name", NAMES)
def test_config_loads_round_trips_and_describes_a_model(name):
    run = _run(name)
    assert config_from_json(config_to_json(run), RunConfig) == run
    expected = (OURS | PAPER).get(name)
    millions = _millions(run)
    assert millions == pytest.approx(expected, rel=0.05 if name in PAPER else 0.25) if expected else millions > 0


@pytest.mark.parametrize("name", NAMES)
def test_docstring_gives_the_command(name):
    docstring = ast.get_docstring(ast.parse(FILES[name].read_text()))
    assert f"--config={name} " in f"{docstring} "


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_those_of_the_release(name):
    layout, widths, feed_forward_widths, rotary_widths = RELEASED[name]
    official = json.loads(to_official_json(_run(name).model))
    assert official["arch_layout"] == layout
    assert official["d_model"] == widths and official["d_intermediate"] == feed_forward_widths
    assert official["ssm_cfg"] == {"chunk_size": 256, "d_conv": 4, "d_state": 128, "expand": 2}
    assert official["attn_cfg"] == {
        "num_heads": [16] * len(widths), "rotary_emb_dim": rotary_widths,
        "window_size": [1023] * (len(widths) - 1) + [-1]}
    assert official["vocab_size"] == 256 and not official["tie_embeddings"]


def test_a_copy_of_a_config_works_from_anywhere(tmp_path):
    shutil.copy(FILES["hnet_1stage_l"], tmp_path / "mine.py")
    assert load_config(str(tmp_path / "mine.py"), [], RunConfig) == _run("hnet_1stage_l")


def test_the_boundary_lm_of_blt_is_the_model_that_its_own_config_trains():
    assert _run("blt_tiny_stdlib").model.boundary_lm == _run("blt_boundary_lm_tiny_stdlib").model


def test_rules_that_cut_are_not_pulled_at():
    for name in NAMES:
        run = _run(name)
        routers = {stage.chunking.router for stage in run.model.stages[:-1]}
        if routers and "learned" not in routers:
            assert run.ratio_objective == "none" or name.startswith("compare_"), name
