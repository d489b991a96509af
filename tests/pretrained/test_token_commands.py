"""The commands on SmolLM2-135M-Instruct: numbers and texts that other code found, printed as a user sees them."""
import re

import numpy as np
import pytest

from experiments import describe, evaluate, generate, inspect
from experiments.errors import UsageError
from tests.support.assertions import PRETRAINED_NATS_ERROR, golden

pytestmark = pytest.mark.slow
UNWRITABLE = "04 06 13 14 16 1d c0 c1 f1 f2 f5 f6 f7 f8 f9 fa fb fc fd fe ff"
KNOWN = {
    b"Hello world": [19556, 905],
    b" 12 34.5": [216, 33, 34, 216, 35, 36, 30, 37],
    b"It's  a\n\n test\t!": [1589, 506, 216, 253, 1116, 1028, 197, 17],
    b"<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
}


@pytest.fixture(scope="module")
def data():
    return golden("lm_smollm2")


def test_known_texts_have_their_ids_and_21_bytes_have_none(smollm2):
    tokenizer = smollm2.tokenizer
    for text, ids in KNOWN.items():
        assert tokenizer.encode(text).tolist() == ids and tokenizer.decode(ids) == text
    writable = tokenizer.without_unwritable(bytes(range(256)))
    assert " ".join(f"{byte:02x}" for byte in range(256) if byte not in writable) == UNWRITABLE
    assert tokenizer.decode(tokenizer.encode(writable * 3)) == writable * 3
    with pytest.raises(UsageError, match=UNWRITABLE):
        tokenizer.encode(bytes(range(256)))


def test_evaluate_prints_the_nats_per_token_of_a_text(smollm2, data, tmp_path, capsys):
    for index in range(int(data["n_texts"])):
        (tmp_path / "text").write_bytes(data[f"text{index}/utf8"].tobytes())
        evaluate.main([f"--workdir={smollm2.workdir}", f"--source=files:{tmp_path}/text",
                       "--config.data.sequence_length=512"])
        shown = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
        expected = float(data[f"text{index}/mean_nats"])
        assert float(shown["eval/nats_per_token"]) == pytest.approx(expected, abs=PRETRAINED_NATS_ERROR)
        ids = data[f"text{index}/ids"]
        num_bytes = int(smollm2.tokenizer.num_bytes[ids[1:]].sum())
        bits = expected * (len(ids) - 1) / num_bytes / np.log(2)
        assert float(shown["eval/bits_per_byte"]) == pytest.approx(bits, abs=PRETRAINED_NATS_ERROR)


@pytest.mark.parametrize("number", [0, 1])
def test_generate_writes_the_most_probable_continuation(smollm2, data, number, tmp_path, capsysbinary):
    prompt, new = data[f"greedy{number}/prompt_utf8"].tobytes(), data[f"greedy{number}/new_ids"]
    eos = np.flatnonzero(new == smollm2.tokenizer.eos)
    expected = smollm2.tokenizer.decode(new[: eos[0] if len(eos) else None])
    (tmp_path / "prompt").write_bytes(prompt)
    generate.main([f"--workdir={smollm2.workdir}", f"--prompt_file={tmp_path}/prompt", f"--length={len(new)}",
                   "--top_k=1", "--temperature=0"])
    captured = capsysbinary.readouterr()
    assert captured.out == prompt + expected + b"\n"
    assert re.fullmatch(rb"the cache takes \d+\.\d MB: 1 x \d+ tokens\n", captured.err)


def test_a_chat_is_answered(smollm2, capsysbinary):
    generate.main([f"--workdir={smollm2.workdir}", "--chat", "--temperature=0", "--length=40",
                   "--prompt=What is the capital of France?"])
    answer = capsysbinary.readouterr().out
    assert b"Paris" in answer and b"<|im_" not in answer


def test_a_prompt_past_the_context_is_refused_with_the_limit(smollm2):
    with pytest.raises(UsageError, match="context_length is 8,192; set it to at most 8,191, or shorten"):
        generate.main([f"--workdir={smollm2.workdir}", "--prompt=Hello", "--length=8192"])


def test_inspect_shows_the_nats_of_every_token(smollm2, data, tmp_path, capsys):
    (tmp_path / "text").write_bytes(data["text0/utf8"].tobytes()[:200])
    inspect.main([f"--workdir={smollm2.workdir}", f"--file={tmp_path}/text", f"--html={tmp_path}/page.html"])
    found = re.findall(r"\[(\d+\.\d)\](?:\||\n)", capsys.readouterr().out)
    num_tokens = len(found)
    assert num_tokens > 20
    np.testing.assert_allclose(np.array(found[:-3], float), data["text0/nats"][: num_tokens - 3], atol=0.051)


def test_describe_counts_its_parameters_and_the_cache_of_its_context(smollm2, capsys):
    describe.main([f"--workdir={smollm2.workdir}"])
    shown = capsys.readouterr().out
    assert "134,515,008" in shown and "room for 8,192 tokens" in shown
    assert re.search(r"decoding, per row +37[789] MB", shown)  # 30 layers, keys and values, 3 heads of 64, float32
