"""Released checkpoints as runs: what is read, what is written, and what is refused before anything is."""
import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from experiments import export_official, export_weights, generate, import_official, import_weights
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.saved_run import SavedRun
from experiments.training.mesh import make_mesh
from experiments.weights.tensor_files import open_tensors
from hnet import BOS, HNetLM, load_official_params, parameter_shapes
from hnet.pretrained.hnet_release import to_official_params
from tests.support.assertions import GOLDEN, GOLDEN_LOGITS_ERROR, golden
from tests.support.runs import refusal

NAME = "hnet_a_1stage"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The files of a small released model, and the run made of them."""
    directory = tmp_path_factory.mktemp("released")
    (directory / "model.json").write_text(str(golden(NAME)["config_json"]))
    files = SimpleNamespace(weights=GOLDEN / f"{NAME}.npz", config=directory / "model.json", run=directory / "run")
    _import(files.weights, files.config, files.run)
    return files


@pytest.fixture(scope="module")
def imported(released):
    return _opened(released.run)


@pytest.fixture(scope="module")
def logits_of(imported):
    """The imported model, compiled once for tokens of one shape."""
    apply = jax.jit(HNetLM(imported.config.model).apply)
    return lambda tokens: np.asarray(apply({"params": imported.params}, tokens).logits)


def _import(weights, config, out):
    import_weights.main(["hnet", str(weights), str(out), f"--config_json={config}"])


def _export(run, out, *arguments):
    export_weights.main(["hnet", f"--workdir={run}", str(out), *arguments])


def _opened(workdir):
    with SavedRun.open(workdir) as saved:
        return SimpleNamespace(config=saved.config, params=saved.params(), step=saved.step)


def _params(workdir, abstract, step=None):
    with SavedRun.open(workdir, step) as saved:
        return saved.params(abstract)


def _assert_equal(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), actual, expected)


def test_an_imported_model_has_the_logits_of_the_release(imported, logits_of):
    data = golden(NAME)
    assert np.abs(logits_of(data["input_ids"]) - data["logits_packed"]).max() <= GOLDEN_LOGITS_ERROR
    assert imported.step == 0


def test_generate_continues_a_prompt_with_an_imported_model(released, logits_of, capsysbinary):
    generate.main([f"--workdir={released.run}", "--prompt=The ", "--length=1", "--temperature=0"])
    start = [BOS, *b"The "]
    tokens = np.zeros_like(golden(NAME)["input_ids"])
    tokens[0, :len(start)] = start  # what follows changes nothing before it
    most_probable = logits_of(tokens)[0, len(start) - 1].argmax()
    assert capsysbinary.readouterr().out == b"The " + bytes([most_probable]) + b"\n"


def test_an_import_says_what_was_read_and_what_the_checkpoint_holds(released, tmp_path, capsys):
    _import(released.weights, released.config, tmp_path / "run")
    assert "132,940 parameters, m2[T2]m2, widths 32, 64\n" in capsys.readouterr().out
    meta = Checkpoints(tmp_path / "run" / "checkpoints", keep=1).read_record().meta
    assert meta["contents"] == "parameters"
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["imported_from"] == str(released.weights)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["sequence_length"] == 8192 and saved["tokens_per_chunk"] == [6.0]


def test_what_was_exported_is_imported_bit_for_bit(released, imported, tmp_path):
    _export(released.run, tmp_path / "model.npz")
    _import(tmp_path / "model.npz", tmp_path / "model.json", tmp_path / "run")
    again = _opened(tmp_path / "run")
    _assert_equal(again.params, imported.params)
    assert again.config == imported.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_other_files_hold_the_same_in_both_precisions(imported, tmp_path, suffix, dtype):
    if suffix == ".pt":
        pytest.importorskip("torch")
    out = tmp_path / f"model{suffix}"
    model = imported.config.model
    export_weights.export_hnet(imported.params, model, out, dtype)
    assert str(open_tensors(out)["lm_head.weight"].dtype).endswith(dtype)
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), imported.params)
    _assert_equal(load_official_params(open_tensors(out), model), rounded)


def test_safetensors_hold_each_tensor_in_the_order_of_its_axes(imported, tmp_path):
    """The library writes memory as it lies, and ours lies transposed."""
    model = imported.config.model
    export_weights.export_hnet(imported.params, model, tmp_path / "model.safetensors", "float32")
    _assert_equal(load_file(tmp_path / "model.safetensors"), to_official_params(imported.params, model))


# Weights of one run for another


def test_weights_go_onto_the_shardings_asked_for(finished_run):
    run = _opened(finished_run)
    mesh = make_mesh(2)
    sharding = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(None, "model"))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), run.params)
    abstract["lm_head"] = jax.ShapeDtypeStruct(run.params["lm_head"].shape, jnp.float32, sharding=split)
    params = _params(finished_run, abstract)
    _assert_equal(params, run.params)
    assert params["lm_head"].sharding == split and params["embedding"].sharding == sharding
    earlier = _params(finished_run, abstract, step=10)
    assert not np.array_equal(earlier["lm_head"], params["lm_head"])


def test_weights_of_an_imported_run_are_restored_too(released, imported):
    _assert_equal(_params(released.run, parameter_shapes(imported.config.model)), imported.params)


def test_weights_of_another_model_are_refused_by_name(imported, finished_run):
    wanted = parameter_shapes(imported.config.model)
    text = refusal(_params, finished_run, wanted)
    assert f"the model of {finished_run} does not fit this one: embedding is float32[256, 16] there and " in text
    assert "float32[256, 32] here (and " in text and "change config.model" in text
    assert "no run has saved a checkpoint there" in refusal(_params, "/nowhere", wanted)


def test_the_config_is_looked_for_beside_the_weights(released, imported, tmp_path):
    _export(released.run, tmp_path / "model.npz")
    import_weights.main(["hnet", str(tmp_path / "model.npz"), str(tmp_path / "run"), "--dtype=bfloat16"])
    again = _opened(tmp_path / "run")
    _assert_equal(again.params, imported.params)
    assert again.config.model == dataclasses.replace(imported.config.model, dtype="bfloat16")


# Refusals


@pytest.mark.parametrize(("command", "now"), [
    (import_official, "import_weights hnet"), (export_official, "export_weights hnet")])
def test_the_commands_of_before_say_what_they_are_called_now(command, now):
    assert f"this command is now `python -m experiments.{now}`" in refusal(command.main, ["a", "b"])


def test_a_directory_with_checkpoints_is_not_imported_into(released):
    assert "has checkpoints already; name another directory" in refusal(
        _import, released.weights, released.config, released.run)


def test_files_that_do_not_fit_each_other_are_refused_and_nothing_is_written(released, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(str(golden("hnet_b_2stage")["config_json"]))
    text = refusal(_import, released.weights, other, tmp_path / "run")
    assert "do not fit each other" in text and "names missing" in text
    narrow = json.loads(released.config.read_text()) | {"d_model": [32, 96]}
    other.write_text(json.dumps(narrow | {"attn_cfg": narrow["attn_cfg"] | {"num_heads": [2, 3]}}))
    assert "pad_dimension has shape (32,), and (64,) in this config" in refusal(
        _import, released.weights, other, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("model.bin", b"", "weights are read from .pt, .safetensors, .npz files, not from '.bin'"),
    ("model.npz", None, "there is no such file"),
    ("model.npz", b"PK", "cannot be read: "),
    ("model.safetensors", b"\x10", "cannot be read: SafetensorError"),
])
def test_weights_that_cannot_be_read_are_refused(released, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refusal(_import, tmp_path / name, released.config, tmp_path / "run")


def test_damage_inside_a_file_is_refused(released, tmp_path):
    content = bytearray(released.weights.read_bytes())
    place = content.find(b"param/backbone.decoder.rmsnorm.weight.npy") + 200
    content[place] ^= 1
    (tmp_path / "model.npz").write_bytes(content)
    assert "model.npz cannot be read: BadZipFile" in refusal(
        _import, tmp_path / "model.npz", released.config, tmp_path / "run")


@pytest.mark.parametrize(("text", "message"), [
    (None, "No such file or directory; name the release's .json file with --config_json=PATH"),
    ("{", "is no config file of the release"),
    ("[1]", "is no config file of the release"),
    ('{"arch_layout": ["T1"]}', "it lacks d_model, vocab_size"),
])
def test_a_config_that_is_none_is_refused(released, tmp_path, text, message):
    if text is not None:
        (tmp_path / "model.json").write_text(text)
    assert message in refusal(_import, released.weights, tmp_path / "model.json", tmp_path / "run")


@pytest.mark.parametrize(("package", "extra"), [("torch", "torch"), ("safetensors", "pretrained")])
def test_a_package_that_is_missing_is_named_with_the_way_to_install_it(
    released, tmp_path, monkeypatch, package, extra
):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # makes `import` fail, installed or not
    suffix = {"torch": ".pt", "safetensors": ".safetensors"}[package]
    file = tmp_path / f"model{suffix}"
    message = f"{file}: {suffix} files need {package}; pip install 'hnet-jax[{extra}]'"
    assert refusal(_export, released.run, file) == message
    file.touch()
    assert refusal(_import, file, released.config, tmp_path / "run") == message


@pytest.mark.parametrize(("name", "argument", "message"), [
    ("model.bin", "--dtype=float32", "weights are written to .pt, .safetensors or .npz files, not to '.bin'"),
    ("model.npz", "--dtype=bfloat16", "--dtype=bfloat16: .npz files have no bfloat16"),
    ("nowhere/model.npz", "--dtype=float32", "there is no directory"),
    ("taken.npz", "--dtype=float32", "taken.json is there already; name another file"),
])
def test_exports_that_cannot_be_are_refused(released, tmp_path, name, argument, message):
    (tmp_path / "taken.json").touch()
    assert message in refusal(_export, released.run, tmp_path / name, argument)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.json"]


def test_a_model_that_the_release_does_not_have_is_not_exported(finished_run, tmp_path):
    assert "needs a stage0.stack.width that is a multiple of 32, not 16" in refusal(
        _export, finished_run, tmp_path / "model.npz")
    assert not any(tmp_path.iterdir())


def test_a_file_of_something_else_than_tensors_is_refused(released, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"model": {"lm_head.weight": torch.zeros(3)}}, tmp_path / "model.pt")
    assert "holds no state dict" in refusal(_import, tmp_path / "model.pt", released.config, tmp_path / "run")
