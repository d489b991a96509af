"""Llamas as files and as runs: GGUF and safetensors read, a directory for the transformers library written."""
import json
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import export_weights, import_weights
from experiments.data.tokenizer import open_tokenizer
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.saved_run import SavedRun
from experiments.weights.gguf_file import open_gguf
from experiments.weights.tensor_files import open_tensors
from hnet import HNetLM, llama_config, load_llama_params
from layers import RotaryScaling
from layers.nn.rotary import stretch
from tests.support.assertions import SAME_COMPUTATION
from tests.support.models import one_stage_config
from tests.support.runs import refusal
from tests.support.small_llama import config_json, random_state, write_gguf
from tests.support.small_tokenizer import write_tokenizer


def _import(*arguments):
    import_weights.main(["llama", *map(str, arguments)])


def _export(*arguments):
    export_weights.main(["llama", *map(str, arguments)])


def _opened(workdir):
    with SavedRun.open(workdir) as saved:
        tokenizer = open_tokenizer(saved.config.data.tokenizer, workdir=saved.workdir)
        return SimpleNamespace(config=saved.config, params=saved.params(), tokenizer=tokenizer)


def _assert_equal(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), actual, expected)


def _write_directory(directory, config, state, *, num_shards=1, tokenizer=True):
    """Writes the files that the transformers library would."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    if tokenizer:
        write_tokenizer(directory)
    if num_shards == 1:
        save_file(state, directory / "model.safetensors")
        return
    names, shard_of = sorted(state), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        save_file({name: state[name] for name in names[shard::num_shards]}, directory / file)
        shard_of |= dict.fromkeys(names[shard::num_shards], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))


@pytest.fixture(scope="module")
def gguf_run(tmp_path_factory):
    """A small GGUF file, what it holds, and the run made of it."""
    directory = tmp_path_factory.mktemp("gguf")
    small = write_gguf(directory / "small.gguf")
    _import(directory / "small.gguf", directory / "run")
    return SimpleNamespace(file=directory / "small.gguf", run=directory / "run", **small._asdict())


# GGUF


@pytest.mark.parametrize("fields", [
    {}, {"num_key_value_heads": 4}, {"tie_word_embeddings": False}, {"model_type": "qwen2"},
    {"model_type": "qwen3"},
])
def test_a_gguf_file_reads_as_the_transformers_library_would_store_the_model(tmp_path, fields):
    small = write_gguf(tmp_path / "small.gguf", **fields)
    file = open_gguf(tmp_path / "small.gguf")
    assert set(file.tensors) == set(small.state)
    for name, value in small.state.items():
        np.testing.assert_array_equal(file.tensors[name], value, strict=True)
    assert llama_config(file.config_json) == llama_config(small.config_json)


def test_rows_of_queries_and_keys_are_put_back_in_halves_and_forgetting_it_changes_logits(gguf_run):
    file, model = open_gguf(gguf_run.file), llama_config(gguf_run.config_json)
    name, stored = "model.layers.1.self_attn.k_proj.weight", file.stored["blk.1.attn_k.weight"]
    half = gguf_run.config_json["head_dim"] // 2
    np.testing.assert_array_equal(file.tensors[name][half], stored[1])  # the partner of row 0
    np.testing.assert_array_equal(file.tensors[name][1], stored[2])
    np.testing.assert_array_equal(file.tensors[name][2 * half], stored[2 * half])  # the next head
    forgotten = {name: file.stored[stored] for name, stored in zip(file.tensors, file.stored, strict=True)}
    tokens = np.arange(40)[None] * 7 % model.vocab_size
    apply = jax.jit(HNetLM(model).apply)
    right, wrong, expected = (
        apply({"params": load_llama_params(state, model)}, tokens).logits
        for state in (file.tensors, forgotten, gguf_run.state))
    np.testing.assert_array_equal(right, expected)
    assert np.abs(right - wrong)[:, 2:].max() > 0.1


def test_a_run_made_of_a_gguf_file_has_its_weights_and_its_tokenizer(gguf_run, capsys):
    run = _opened(gguf_run.run)
    assert run.config.model == llama_config(gguf_run.config_json)
    _assert_equal(run.params, load_llama_params(gguf_run.state, run.config.model))
    assert run.config.data.tokenizer == "tokenizer.json" and run.config.data.sequence_length == 256
    text = "import the 12 of it, é".encode()
    ids = run.tokenizer.encode(text)
    assert run.tokenizer.decode(ids) == text and len(ids) < len(text)
    assert run.tokenizer.eos == 2 and run.tokenizer.bos is None
    meta = Checkpoints(gguf_run.run / "checkpoints", keep=1).read_record().meta
    assert meta["contents"] == "parameters"
    manifest = json.loads((gguf_run.run / "manifest.json").read_text())
    assert manifest["imported_from"] == str(gguf_run.file)


def test_types_of_half_precision_are_read(tmp_path):
    types = {"token_embd.weight": "F16", "blk.0.ffn_up.weight": "BF16"}
    small = write_gguf(tmp_path / "small.gguf", types=types)
    file = open_gguf(tmp_path / "small.gguf")
    for name, value in small.state.items():
        np.testing.assert_array_equal(file.tensors[name], value, strict=True)


def _rope(config_json):
    return llama_config(config_json).stages[0].stack.attention.rotary_scaling


def test_rotary_scalings_of_a_gguf_file_are_read(tmp_path):
    path = tmp_path / "small.gguf"
    write_gguf(path, metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert _rope(open_gguf(path).config_json) == RotaryScaling(kind="linear", factor=4.0)
    write_gguf(path, metadata={"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 8.0,
                               "llama.rope.scaling.original_context_length": 64})
    assert _rope(open_gguf(path).config_json) == RotaryScaling(kind="yarn", factor=8.0, original_length=64)
    write_gguf(path, metadata={"llama.rope.scaling.type": "longrope"})
    assert "scales rotary positions by 'longrope'" in refusal(open_gguf, path)


def test_divisors_of_rotary_frequencies_are_the_rule_of_llama3_or_refused(tmp_path):
    path, scaling = tmp_path / "small.gguf", RotaryScaling(kind="llama3", factor=32.0)
    plain = 5e5 ** (-np.arange(8) / 8)
    factors = plain / np.asarray(stretch(jnp.asarray(plain, jnp.float32), 5e5, scaling))
    assert factors.max() == pytest.approx(32) and factors.min() == 1
    write_gguf(path, rope_theta=5e5, rope_factors=factors)
    file = open_gguf(path)
    assert _rope(file.config_json) == scaling and "rope_freqs.weight" not in file.tensors
    write_gguf(path, rope_theta=5e5, rope_factors=factors + (np.arange(8) == 5))
    assert "rope_freqs.weight is not the rule of Llama 3" in refusal(open_gguf, path)


def _cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_gguf_file_that_is_cut_off_is_refused(tmp_path, gguf_run, share):
    file = shutil.copy(gguf_run.file, tmp_path / "cut.gguf")
    _cut(file, int(share * file.stat().st_size))
    text = refusal(_import, file, tmp_path / "run")
    assert "cut.gguf" in text and "cut off" in text and f"{file.stat().st_size:,} " in text
    assert not (tmp_path / "run").exists()


def test_gguf_files_of_other_models_and_types_are_refused(tmp_path, gguf_run):
    file = tmp_path / "other.gguf"

    def refused(**changed):
        write_gguf(file, **changed)
        return refusal(_import, file, tmp_path / "run")

    bytes_ = bytearray(gguf_run.file.read_bytes())
    place = bytes_.find(b"llama")
    bytes_[place:place + 5] = b"mamba"
    file.write_bytes(bytes_)
    assert "is of architecture 'mamba'; those read here are llama, qwen2, qwen3" in refusal(
        _import, file, tmp_path / "run")
    place = gguf_run.file.read_bytes().find(b"blk.0.attn_v.weight") + 19 + 4 + 2 * 8  # name, number of axes, axes
    unknown = "has a type of tensors that the package gguf does not know", "blk.0.attn_v.weight is of type Q8_1"
    for kind, message in zip((99, 9), unknown, strict=True):  # 9 is for intermediate results
        bytes_ = bytearray(gguf_run.file.read_bytes())
        assert bytes_[place] == 3, "Q4_1"
        bytes_[place] = kind
        file.write_bytes(bytes_)
        text = refusal(_import, file, tmp_path / "run")
        assert message in text
    assert "has 8 experts per layer" in refused(metadata={"llama.expert_count": 8})
    assert "has 128 tokens in a window" in refused(metadata={"llama.attention.sliding_window": 128})
    assert "rotates 8 features of heads of 16" in refused(metadata={"llama.rope.dimension_count": 8})
    assert "'llama-bpe' is not reproduced here" in refused(pre="llama-bpe")
    file.write_bytes(b"no weights at all")
    assert "is no GGUF file: it begins with b'no w'" in refusal(_import, file, tmp_path / "run")
    assert "there is no such file" in refusal(_import, tmp_path / "none.gguf", tmp_path / "run")
    assert "is not there: name a .gguf file or a directory" in refusal(_import, tmp_path / "no", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Safetensors


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_directory_of_the_transformers_library_becomes_a_run(tmp_path, num_shards):
    config = config_json(tie_word_embeddings=False)
    state = random_state(config)
    _write_directory(tmp_path / "model", config, state, num_shards=num_shards)
    _import(tmp_path / "model", tmp_path / "run", "--dtype=bfloat16")
    run = _opened(tmp_path / "run")
    assert run.config.model == llama_config(config, dtype="bfloat16")
    _assert_equal(run.params, load_llama_params(state, run.config.model))
    assert run.tokenizer.decode(run.tokenizer.encode(b"the end")) == b"the end"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_as_the_same_numbers_in_float32(tmp_path, dtype):
    config = config_json()
    state = {name: value.astype(jnp.dtype(dtype)) for name, value in random_state(config).items()}
    _write_directory(tmp_path / "model", config, state)
    params = load_llama_params(open_tensors(tmp_path / "model"), llama_config(config))
    wanted = {name: value.astype(np.float32) for name, value in state.items()}
    _assert_equal(params, load_llama_params(wanted, llama_config(config)))


def test_directories_that_do_not_fit_are_refused_by_name(tmp_path):
    config = config_json()
    state = random_state(config)

    def refused(change):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        _write_directory(tmp_path / "model", config, state, num_shards=2)
        index = tmp_path / "model" / "model.safetensors.index.json"
        change(tmp_path / "model", index, json.loads(index.read_text())["weight_map"])
        text = refusal(_import, tmp_path / "model", tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return text

    def shard(number):
        return f"model-{number:05}-of-00002.safetensors"

    def rewrite(index, shard_of):
        index.write_text(json.dumps({"weight_map": shard_of}))

    lost = "model.norm.weight"
    assert f"1 tensors are not where it says (extra.weight), 1 are not in it ({lost})" in refused(
        lambda model, index, shard_of: rewrite(index, {
            name: file for name, file in shard_of.items() if name != lost} | {"extra.weight": shard(1)}))
    assert f"{shard(2)}: there is no such file" in refused(
        lambda model, index, shard_of: (model / shard(2)).unlink())
    assert f"{shard(1)} cannot be read: SafetensorError" in refused(
        lambda model, index, shard_of: _cut(model / shard(1), 5000))
    assert "has neither model.safetensors nor model.safetensors.index.json" in refused(
        lambda model, index, shard_of: index.unlink())
    assert "config.json: No such file or directory" in refused(
        lambda model, index, shard_of: (model / "config.json").unlink())
    assert "config.json holds a list" in refused(
        lambda model, index, shard_of: (model / "config.json").write_text("[]"))
    deeper = json.dumps(config | {"num_hidden_layers": 3})
    assert "9 names missing (model.layers.2.input_layernorm.weight, " in refused(
        lambda model, index, shard_of: (model / "config.json").write_text(deeper))
    other = json.dumps(config | {"model_type": "gpt2"})
    assert "model_type 'gpt2' is not one of" in refused(
        lambda model, index, shard_of: (model / "config.json").write_text(other))


def test_weights_that_are_not_finite_are_named(tmp_path):
    state = random_state(config_json())
    state["model.norm.weight"] = np.where(np.arange(64) == 3, np.float32(np.inf), state["model.norm.weight"])
    _write_directory(tmp_path / "model", config_json(), state)
    assert "model.norm.weight has 1 of 64 numbers that are NaN or infinite" in refusal(
        _import, tmp_path / "model", tmp_path / "run")


# Tokenizers


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_and_one_with_fewer_is_told(tmp_path, capsys):
    for change, said in ((-1, ""), (10, "290 tokens, 10 fewer than embeddings")):
        config = config_json()
        config["vocab_size"] += change
        directory = tmp_path / f"model{change}"
        _write_directory(directory, config, random_state(config))
        if said:
            _import(directory, tmp_path / "run")
            assert said in capsys.readouterr().out
        else:
            assert "has ids up to 289, and config.model.vocab_size is 289" in refusal(
                _import, directory, tmp_path / "run")


def test_a_tokenizer_that_is_missing_is_asked_for_and_may_be_elsewhere_or_none(tmp_path):
    _write_directory(tmp_path / "model", config_json(), random_state(config_json()), tokenizer=False)
    assert "tokenizer.json: No such file or directory; name a tokenizer.json with --tokenizer=PATH" in refusal(
        _import, tmp_path / "model", tmp_path / "run")
    _import(tmp_path / "model", tmp_path / "bytes", "--tokenizer=none")
    assert _opened(tmp_path / "bytes").config.data.tokenizer == ""
    elsewhere = write_tokenizer(tmp_path / "elsewhere")
    _import(tmp_path / "model", tmp_path / "run", f"--tokenizer={elsewhere}")
    assert _opened(tmp_path / "run").tokenizer.vocab_size == 290


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_a_package_that_is_missing_is_named_with_the_way_to_install_it(gguf_run, tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # makes `import` fail, installed or not
    text = refusal(_import, gguf_run.file, tmp_path / "run")
    assert package in text and "pip install 'hnet-jax[pretrained]'" in text


# Export


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_directory_is_imported_as_the_same_run(gguf_run, tmp_path, dtype):
    before = _opened(gguf_run.run)
    _export(f"--workdir={gguf_run.run}", tmp_path / "model", f"--dtype={dtype}")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["torch_dtype"] == dtype and written["eos_token_id"] == 2
    _import(tmp_path / "model", tmp_path / "run")
    after = _opened(tmp_path / "run")
    assert after.config == before.config and after.tokenizer.fingerprint == before.tokenizer.fingerprint
    _assert_equal(after.params, jax.tree.map(
        lambda leaf: leaf.astype(dtype).astype(jnp.float32), before.params))
    assert "is there already; name another file" in refusal(
        _export, f"--workdir={gguf_run.run}", tmp_path / "model")


def test_a_model_that_is_no_llama_is_not_exported(tmp_path):
    saved = SimpleNamespace(config=SimpleNamespace(model=one_stage_config()))  # its weights are not asked for
    assert "a Llama has one stage and no chunks, and this model 2 stages" in refusal(
        export_weights.export_llama, saved, tmp_path / "model", "float32")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("fields", [
    {}, {"model_type": "mistral", "sliding_window": 9}, {"model_type": "qwen2", "tie_word_embeddings": False},
    {"model_type": "qwen3", "head_dim": 32, "rms_norm_eps": 1e-6},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 64}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
], ids=["llama", "mistral", "qwen2", "qwen3", "linear", "llama3", "yarn"])
def test_the_transformers_library_computes_the_same_logits_from_an_exported_directory(tmp_path, fields):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = config_json(**fields)
    _write_directory(tmp_path / "model", config, random_state(config))
    _import(tmp_path / "model", tmp_path / "run")
    _export(f"--workdir={tmp_path / 'run'}", tmp_path / "out")
    run = _opened(tmp_path / "run")
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 90))
    ours = jax.jit(HNetLM(run.config.model).apply)({"params": run.params}, tokens).logits
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(ours - theirs).max() <= SAME_COMPUTATION * np.abs(theirs).max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "import the 12 of it, é"
    assert tokenizer(text)["input_ids"] == run.tokenizer.encode(text.encode()).tolist()
