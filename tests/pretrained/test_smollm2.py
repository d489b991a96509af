"""SmolLM2-135M-Instruct against a float64 forward by other code: weights, ids, logits, everything between."""
import dataclasses
import hashlib
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import export_weights
from experiments.data.tokenizer import open_tokenizer
from experiments.weights.tensor_files import open_tensors
from hnet import HNetLM, Sampling, generate
from hnet.stack import Block
from layers import RMSNorm
from tests.support.assertions import (
    PRETRAINED_ATTENTION_ERROR,
    PRETRAINED_BFLOAT16_MEAN_NATS,
    PRETRAINED_HIDDEN_LIMIT,
    PRETRAINED_LOGITS_ERROR,
    PRETRAINED_NATS_ERROR,
    PRETRAINED_ROTATED_ERROR,
    golden,
)

pytestmark = pytest.mark.slow
HEAD_CHUNK = 512  # positions whose logits are in memory at once


@pytest.fixture(scope="module")
def data():
    return golden("lm_smollm2")


@pytest.fixture(scope="module")
def long_data():
    return golden("lm_smollm2_long")


@pytest.fixture(scope="module")
def texts(data):
    """Every text of the file, as the arrays under its prefix."""
    return [{name.removeprefix(f"text{index}/"): value for name, value in data.items()
             if name.startswith(f"text{index}/")} for index in range(int(data["n_texts"]))]


def _sha256(values):
    return hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()


# Weights


def test_the_file_is_the_one_that_the_vectors_are_of(smollm2, data):
    content = smollm2.weights_path.read_bytes()
    assert len(content) == int(data["gguf_bytes"])
    assert hashlib.sha256(content).hexdigest() == str(data["gguf_sha256"])


def test_the_config_is_that_of_the_model(smollm2, data):
    config = json.loads(str(data["config_json"]))
    stack = smollm2.config.stages[0].stack
    attention = stack.attention
    found = {
        "vocab_size": smollm2.config.vocab_size, "hidden_size": stack.width,
        "intermediate_size": stack.feed_forward_width, "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_key_heads, "head_dim": attention.head_width,
        "max_position_embeddings": smollm2.config.context_length, "rms_norm_eps": stack.norm_epsilon,
        "rope_theta": attention.rotary_base, "tie_word_embeddings": smollm2.config.tie_embeddings}
    assert found == {name: config[name] for name in found}
    assert smollm2.config.stages[0].encoder == f"T{config['num_hidden_layers']}"
    assert attention.rotary_width == config["head_dim"]
    tokenizer = smollm2.tokenizer
    assert tokenizer.eos == config["eos_token_id"] and tokenizer.vocab_size == config["vocab_size"]
    assert (tokenizer.bos is not None) == config["add_bos"]


def test_tensors_are_dequantised_to_the_same_bits(smollm2, data):
    stored, shapes = smollm2.weights.stored, json.loads(str(data["tensor_shapes_json"]))
    for name, shape, digest in zip(data["tensor_names"], shapes, data["tensor_sha256"], strict=True):
        assert stored[str(name)].shape == tuple(shape), name
        assert _sha256(stored[str(name)]) == str(digest), name
    digests = b"".join(bytes.fromhex(_sha256(stored[name])) for name in stored)
    assert hashlib.sha256(digests).hexdigest() == str(data["all_tensors_sha256"])


def test_rows_of_queries_and_keys_are_in_halves_in_the_file_as_read_and_in_the_run(smollm2, data):
    tensors, stored = smollm2.weights.tensors, smollm2.weights.stored
    mixer = smollm2.params["stage0"]["encoder"]["run0"]["mixer"]
    width = smollm2.config.stages[0].stack.width
    run = {"q_proj": mixer["q"]["kernel"][0], "k_proj": mixer["kv"]["kernel"][0][:, 0]}
    for name, digest in zip(run, data["tensor_sha256_halfsplit"], strict=True):
        assert _sha256(tensors[f"model.layers.0.self_attn.{name}.weight"]) == str(digest)
        assert _sha256(np.asarray(run[name]).reshape(width, -1).T) == str(digest)
    np.testing.assert_array_equal(stored["blk.0.attn_q.weight"][1, :8], data["q0_row1_gguf_first8"])
    np.testing.assert_array_equal(
        tensors["model.layers.0.self_attn.q_proj.weight"][1, :8], data["q0_row1_halfsplit_first8"])


def test_an_exported_directory_has_every_tensor_bit_by_bit_and_the_tokenizer(smollm2, tmp_path):
    export_weights.main(["llama", f"--workdir={smollm2.workdir}", str(tmp_path / "out")])
    written, wanted = open_tensors(tmp_path / "out"), smollm2.weights.tensors
    assert set(written) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(written[name], wanted[name], strict=True, err_msg=name)
    exported = open_tokenizer("tokenizer.json", workdir=tmp_path / "out")
    assert exported.fingerprint == smollm2.tokenizer.fingerprint and exported.eos == smollm2.tokenizer.eos
    shutil.rmtree(tmp_path / "out")  # half a gigabyte


# Tokens


def test_texts_have_the_same_ids_and_come_back(smollm2, texts, data, long_data):
    pairs = [(text["utf8"], text["ids"]) for text in texts] + [(long_data["utf8"], long_data["ids"])]
    pairs += [(data[f"greedy{index}/prompt_utf8"], data[f"greedy{index}/prompt_ids"]) for index in _greedy(data)]
    for utf8, ids in pairs:
        np.testing.assert_array_equal(smollm2.tokenizer.encode(utf8.tobytes()), ids)
        assert smollm2.tokenizer.decode(ids) == utf8.tobytes()
        assert smollm2.tokenizer.num_bytes[ids].sum() == len(utf8)


# One pass


@pytest.fixture(scope="module")
def one_pass(smollm2, texts, data):
    """Arrays [text, t, ...] by name, of one pass over all texts as rows of a batch, padded at their ends."""
    tokens = np.zeros((2, len(texts), max(len(text["ids"]) for text in texts)), np.int32)
    for row, text in enumerate(texts):
        tokens[:, row, :len(text["ids"])] = text["ids"], np.ones_like(text["ids"])
    layers = sorted({int(layer) for text in texts for layer in text["hidden_layers"] if layer})
    found = jax.device_get(_run(smollm2, layers, *map(int, (data["kv_layer"], data["attn_layer"])))(
        smollm2.params, *tokens))
    found["hidden"] = dict(zip(layers, found["hidden"], strict=True))
    found["hidden"][0] = np.asarray(smollm2.params["embedding"])[tokens[0]]
    return found


def _run(smollm2, layers, kv_layer, attn_layer):
    def is_wanted(module, method):
        is_last_norm = isinstance(module, RMSNorm) and module.name == "final_norm"
        return method == "__call__" and (isinstance(module, Block) or is_last_norm)

    @jax.jit
    def run(params, tokens, segment_ids):
        output, seen = smollm2.model.apply(
            {"params": params}, tokens, segment_ids, capture_intermediates=is_wanted, mutable="intermediates")
        encoder = seen["intermediates"]["stage0"]["encoder"]
        block = encoder["run0"]
        ((carry, _),) = block["__call__"]
        at = {name: block["mixer"][name][0] for name in ("queries", "keys", "values")}
        return {
            "logits": output.logits,
            "hidden": [(carry.h + carry.residual)[layer - 1] for layer in layers],
            "final_normed": encoder["final_norm"]["__call__"][0],
            "kv": {name: x[kv_layer] for name, x in at.items()},
            "attn": {name: x[attn_layer] for name, x in at.items()},
        }

    return run


def test_logits_are_those_of_the_vectors(one_pass, texts):
    for row, text in enumerate(texts):
        logits = one_pass["logits"][row]
        assert np.abs(logits[text["full_pos"]] - text["full_logits"]).max() <= PRETRAINED_LOGITS_ERROR
        top = np.take_along_axis(logits[text["pos"]], text["top_ids"], axis=1)
        assert np.abs(top - text["top_logits"]).max() <= PRETRAINED_LOGITS_ERROR
        # What is not among the top is below all of it.
        others = logits[text["pos"]].copy()
        np.put_along_axis(others, text["top_ids"], -np.inf, axis=1)
        assert (others.max(axis=1) <= top.min(axis=1) + 2 * PRETRAINED_LOGITS_ERROR).all()


def test_nats_of_every_token_are_those_of_the_vectors(one_pass, texts):
    for row, text in enumerate(texts):
        length = len(text["ids"])
        logits = one_pass["logits"][row, :length].astype(np.float64)
        lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        assert np.abs(lse - text["lse"]).max() <= PRETRAINED_NATS_ERROR
        nats = lse[:-1] - logits[np.arange(length - 1), text["ids"][1:]]
        assert np.abs(nats - text["nats"]).max() <= PRETRAINED_NATS_ERROR
        assert abs(nats.mean() - float(text["mean_nats"])) <= PRETRAINED_NATS_ERROR / 10


def _assert_rows(actual, expected):
    """Compares relative to each row's largest value, which is 26,000 at position 0 and about 150 elsewhere."""
    error = np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)
    assert error.max() <= PRETRAINED_HIDDEN_LIMIT, error


def test_the_residual_stream_is_that_of_the_vectors_after_every_block_that_they_have(one_pass, texts):
    for row, text in enumerate(texts):
        for layer, expected in zip(text["hidden_layers"], text["hidden"], strict=True):
            _assert_rows(one_pass["hidden"][int(layer)][row, text["hidden_pos"]], expected)
        _assert_rows(one_pass["final_normed"][row, text["hidden_pos"]], text["final_normed"])


def _unrotate(x, positions, base):
    """Turns heads [t, h, k] back, one pair of halves at a time."""
    half = x.shape[-1] // 2
    angle = (positions[:, None] * base ** (-np.arange(half) / half))[:, None]
    first, second = x[..., :half].astype(np.float64), x[..., half:]
    return np.concatenate([first * np.cos(angle) + second * np.sin(angle),
                           second * np.cos(angle) - first * np.sin(angle)], axis=-1)


def test_queries_keys_and_values_are_those_of_the_vectors_rotated_and_not(smollm2, one_pass, texts):
    base = smollm2.config.stages[0].stack.attention.rotary_base
    for row, text in enumerate(texts):
        at = text["hidden_pos"]
        q, k, v = (one_pass["kv"][name][row, at] for name in ("queries", "keys", "values"))
        for actual, name in ((q, "q_rotated"), (k, "k_rotated"), (v, "v"), (_unrotate(q, at, base), "q_unrotated"),
                             (_unrotate(k, at, base), "k_unrotated")):
            assert np.abs(actual - text[f"kv/{name}"]).max() <= PRETRAINED_ROTATED_ERROR, name


def test_attention_weights_are_those_of_the_vectors(one_pass, texts, data):
    for row, text in enumerate(texts):
        length = len(text["ids"])
        q, k = one_pass["attn"]["queries"][row], one_pass["attn"]["keys"][row]
        group = q.shape[1] // k.shape[1]
        for head, expected in zip(data["attn_heads"], text["attn"], strict=True):
            scores = q[text["attn_pos"], head] @ k[:length, head // group].T / q.shape[-1] ** 0.5
            scores = np.where(np.arange(length) <= text["attn_pos"][:, None], scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            assert np.abs(weights - expected).max() <= PRETRAINED_ATTENTION_ERROR


def _neighbours(kernel, axis):
    """Puts the features of heads back into the order of rotary pairs of neighbours, along `axis`."""
    shape, half = kernel.shape, kernel.shape[axis] // 2
    split = kernel.reshape(*shape[:axis], 2, half, *shape[axis + 1:])
    return jnp.swapaxes(split, axis, axis + 1).reshape(shape)


def test_forgetting_the_order_of_rows_costs_two_nats_per_token(smollm2, one_pass, texts):
    mixer = smollm2.params["stage0"]["encoder"]["run0"]["mixer"]
    q, kv = mixer["q"]["kernel"], mixer["kv"]["kernel"]  # [layers, in, (2,) heads, head width]
    forgotten = dict(mixer) | {
        "q": {"kernel": _neighbours(q, 3)},
        "kv": {"kernel": kv.at[:, :, 0].set(_neighbours(kv[:, :, 0], 3))}}
    params = jax.tree.map(lambda leaf: leaf, smollm2.params)
    params["stage0"]["encoder"]["run0"]["mixer"] = forgotten
    text = max(texts, key=lambda text: len(text["ids"]))
    nats = _nats(smollm2.model, params, text["ids"])
    assert nats.mean() - float(text["mean_nats"]) > 2


def test_bfloat16_changes_the_mean_by_thousandths_of_a_nat(smollm2, texts):
    """Its rounding is 0.4 in single logits, and averages out; the residual stream stays float32."""
    text = max(texts, key=lambda text: len(text["ids"]))
    model = HNetLM(dataclasses.replace(smollm2.config, dtype="bfloat16"))
    error = _nats(model, smollm2.params, text["ids"]).mean() - float(text["mean_nats"])
    assert 0 < abs(error) <= PRETRAINED_BFLOAT16_MEAN_NATS


# A long text, and a continuation


def _nats(model, params, ids):
    """Nats of every token after the first; logits are made a few positions at a time."""
    @jax.jit
    def hidden(params, tokens):
        # Nothing but the last norm is asked for, so that XLA leaves out the head.
        _, seen = model.apply(
            {"params": params}, tokens, mutable="intermediates",
            capture_intermediates=lambda module, _: module.name == "final_norm")
        return seen["intermediates"]["stage0"]["encoder"]["final_norm"]["__call__"][0][0].astype(jnp.float32)

    @jax.jit
    def nats(embedding, h, targets):
        return -jnp.take_along_axis(jax.nn.log_softmax(h @ embedding.T), targets[:, None], axis=1)[:, 0]

    h = hidden(params, ids[None])
    pieces = [slice(start, min(start + HEAD_CHUNK, len(ids) - 1)) for start in range(0, len(ids) - 1, HEAD_CHUNK)]
    nats = partial(nats, params["embedding"])
    return np.concatenate([nats(h[piece], ids[1:][piece]) for piece in pieces])


def test_nats_per_window_of_a_long_text_are_those_of_the_vectors(smollm2, long_data):
    nats = _nats(smollm2.model, smollm2.params, long_data["ids"])
    assert np.abs(nats - long_data["nats"]).max() <= PRETRAINED_NATS_ERROR
    windows = long_data["window_mean_nats"]
    size = len(long_data["ids"]) // len(windows)
    means = [nats[max(size * w - 1, 0):size * (w + 1) - 1].mean() for w in range(len(windows))]
    np.testing.assert_allclose(means, windows, atol=PRETRAINED_NATS_ERROR / 10)
    assert abs(nats.mean() - float(long_data["mean_nats"])) <= PRETRAINED_NATS_ERROR / 10


def _greedy(data):
    return range(sum(name.endswith("/prompt_ids") for name in data))


def test_the_most_probable_continuation_is_that_of_the_vectors(smollm2, data):
    prompts = [data[f"greedy{index}/prompt_ids"].tolist() for index in _greedy(data)]
    wanted = np.stack([data[f"greedy{index}/new_ids"] for index in _greedy(data)])
    found = generate(smollm2.model, smollm2.params, prompts, num_tokens=wanted.shape[1],
                     sampling=Sampling(temperature=0))
    np.testing.assert_array_equal(np.stack(list(found), axis=1), wanted)
