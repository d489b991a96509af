"""Tokenizers lose nothing, know the bytes of every token, and refuse what they cannot do."""
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.gguf_vocabulary import build_tokenizer
from experiments.data.tokenizer import ByteTokenizer, check_vocabulary, open_tokenizer
from experiments.errors import UsageError
from tests.support.small_tokenizer import MISSING, SPECIAL, vocabulary, write_tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bpe(path):
    return open_tokenizer(str(path))


def _words(tokenizer, text: bytes) -> list[bytes]:
    return [tokenizer.decode([index]) for index in tokenizer.encode(text)]


WRITABLE = st.binary(max_size=60).map(lambda text: text.translate(None, delete=MISSING))
PIECES = st.lists(st.one_of(WRITABLE, st.text(max_size=9).map(lambda text: text.encode("utf-8", "surrogatepass")),
                            st.sampled_from([b"<|end|>", b" the", b"12 3", b"\xf0\x9f\x98", b"\xed\xa0\x80"])))


@settings(max_examples=200, deadline=None)
@given(PIECES.map(b"".join))
def test_decoding_gives_every_writable_text_back_and_bytes_per_token_add_up(bpe, text):
    text = bpe.without_unwritable(text)
    ids = bpe.encode(text)
    assert ids.dtype == np.int32
    assert bpe.decode(ids) == text
    assert bpe.num_bytes[ids].sum() == len(text)
    ends = np.cumsum(bpe.num_bytes[ids])
    for index, end in enumerate(ends):
        assert bpe.decode(ids[: index + 1]) == text[:end]


@pytest.mark.parametrize(("text", "expected"), [
    (b"the and the", [b"t", b"h", b"e", b" and", b" the"]),
    (b"a 12 34", [b"a", b" ", b"1", b"2", b" ", b"3", b"4"]),
    (b"<|user|>hi<|end|>", [b"<|user|>", b"h", b"i", b"<|end|>"]),
    (b" the\xfe\xfe the", [b" the", b"\xfe", b"\xfe", b" the"]),
    ("é".encode() + b"\xe9", [b"\xc3", b"\xa9", b"\xe9"]),
    (b"", []),
])
def test_words_are_cut_as_the_vocabulary_says(bpe, text, expected):
    assert _words(bpe, text) == expected


def test_digits_stay_together_where_the_rule_says_so(tmp_path):
    gpt2 = open_tokenizer(str(write_tokenizer(tmp_path, pre="gpt-2")))
    assert _words(gpt2, b" 12 34") == [b" ", b"12", b" ", b"3", b"4"]  # "12" is a token, alone digits never join
    assert gpt2.fingerprint != open_tokenizer(str(write_tokenizer(tmp_path))).fingerprint


def test_bytes_without_a_token_are_named(bpe):
    with pytest.raises(UsageError, match=r"cannot write: 04 ff \(hex\), the first at byte 2") as refusal:
        bpe.encode(b"ab\xff\x04\xff")
    assert "\n" not in str(refusal.value)
    assert bpe.without_unwritable(b"a\xffb\x04") == b"ab"
    for byte in MISSING:
        with pytest.raises(UsageError, match=f"{byte:02x}"):
            bpe.encode(bytes([byte]))


def test_special_tokens_come_from_the_file_beside(tmp_path, bpe):
    assert (bpe.bos, bpe.eos) == (None, 2)
    assert open_tokenizer(str(write_tokenizer(tmp_path, add_bos_token=True))).bos == 1
    content = {"content": "<|end|>", "lstrip": False}
    assert open_tokenizer(str(write_tokenizer(tmp_path, eos_token=content))).eos == 2
    with pytest.raises(UsageError, match=r"eos_token '<\|fin\|>' is not in the vocabulary"):
        open_tokenizer(str(write_tokenizer(tmp_path, eos_token="<|fin|>")))
    with pytest.raises(UsageError, match="add_bos_token is set, and there is no bos_token"):
        open_tokenizer(str(write_tokenizer(tmp_path, add_bos_token=True, bos_token=None)))
    (tmp_path / "tokenizer_config.json").unlink()
    bare = open_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (bare.bos, bare.eos) == (None, None)
    with pytest.raises(UsageError, match="no chat_template"):
        bare.render_chat([])


def test_without_add_bos_token_the_tokenizer_itself_says_whether_there_is_a_bos(path, tmp_path):
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(path))
    for template, bos in (("<|user|> $A", 1), ("$A <|end|>", None), ("<|pad|> $A <|end|>", 0)):
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<|pad|>", 0), ("<|user|>", 1), ("<|end|>", 2)])
        made.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
        tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
        assert tokenizer.bos == bos and _words(tokenizer, b"ab") == [b"a", b"b"]
        (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
        assert open_tokenizer(str(tmp_path / "tokenizer.json")).bos is None


def test_fingerprints_tell_tokenizers_apart(tmp_path, bpe):
    same = open_tokenizer(str(write_tokenizer(tmp_path)))
    assert same.fingerprint == bpe.fingerprint != ByteTokenizer().fingerprint
    assert open_tokenizer(str(write_tokenizer(tmp_path, add_bos_token=True))).fingerprint != same.fingerprint


def test_a_chat_is_rendered_by_its_template(bpe, tmp_path):
    messages = [{"role": "user", "content": "grün {{ 1 }}"}]
    assert bpe.render_chat(messages) == "<|user|>user\ngrün {{ 1 }}<|end|><|user|>model\n".encode()
    for template, message in (("{{ raise_exception('roles must take turns') }}", "roles must take turns"),
                              ("{{ messages.pop() }}", "cannot be rendered: SecurityError"),
                              ("{{ ''.__class__.__mro__ }}", "cannot be rendered: SecurityError"),
                              ("{% if %}", "cannot be rendered: TemplateSyntaxError")):
        with pytest.raises(UsageError, match=message):
            open_tokenizer(str(write_tokenizer(tmp_path, chat_template=template))).render_chat(messages)
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d{{ eos_token }}"}]
    assert open_tokenizer(str(write_tokenizer(tmp_path, chat_template=several))).render_chat([]) == b"d<|end|>"


@pytest.mark.parametrize(("change", "message"), [
    (lambda fields: fields["model"].update(type="WordPiece"), "its model is 'WordPiece'"),
    (lambda fields: fields["model"].update(byte_fallback=True), "falls back to bytes"),
    (lambda fields: fields["model"].update(end_of_word_suffix="</w>"), "marks the ends of words"),
    (lambda fields: fields.update(normalizer={"type": "Lowercase"}), "normalizer 'Lowercase' changes the text"),
    (lambda fields: fields["added_tokens"][2].update(lstrip=True), "take in blanks"),
    (lambda fields: fields["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
     "does not give a text back"),
    (lambda fields: fields["model"]["vocab"].update({"\u2581a": 999}), "token '\u2581a' .id 999. is not written"),
    (lambda fields: fields.pop("model"), "is not a tokenizer.json: KeyError"),
])
def test_tokenizers_that_would_change_a_text_are_refused(path, tmp_path, change, message):
    fields = json.loads(path.read_text())
    change(fields)
    (tmp_path / "other.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=message) as refusal:
        open_tokenizer(str(tmp_path / "other.json"))
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


def test_unicode_composition_is_left_out(path, tmp_path, bpe):
    fields = json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "nfc.json").write_text(json.dumps(fields))
    text = "e\u0301".encode()  # which NFC would make one letter of
    assert open_tokenizer(str(tmp_path / "nfc.json")).encode(text).tolist() == bpe.encode(text).tolist()


def test_truncation_and_padding_of_the_file_are_ignored(path, tmp_path):
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(path))
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "cut.json"))
    assert _words(open_tokenizer(str(tmp_path / "cut.json")), b"abcd") == [b"a", b"b", b"c", b"d"]


def test_a_relative_path_is_looked_up_in_the_workdir_first(tmp_path, monkeypatch):
    for name, bos in (("run", True), ("here", False)):
        write_tokenizer(tmp_path / name, add_bos_token=bos)
    monkeypatch.chdir(tmp_path / "here")
    assert open_tokenizer("tokenizer.json", workdir=tmp_path / "run").bos == 1
    assert open_tokenizer("tokenizer.json", workdir=tmp_path).bos is None
    with pytest.raises(UsageError, match=r"'none.json': there is no such file \(looked at .*none.json and .*none"):
        open_tokenizer("none.json", workdir=tmp_path)
    with pytest.raises(UsageError, match="name the file tokenizer"):
        open_tokenizer(str(tmp_path / "run"))


def test_a_tokenizer_without_its_package_says_how_to_get_it(path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'hnet-jax\[pretrained\]'"):
        open_tokenizer(str(path))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(bpe):
    check_vocabulary(bpe, bpe.vocab_size, "a.json")
    last = bpe.vocab_size - 1
    with pytest.raises(UsageError, match=rf"'a.json' has ids up to {last}, and config.model.vocab_size is {last}"):
        check_vocabulary(bpe, last, "a.json")


def test_bytes_are_their_own_tokens():
    tokenizer = open_tokenizer("")
    text = bytes(range(256))
    assert tokenizer.encode(text).tolist() == list(range(256)) and tokenizer.decode(range(256)) == text
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (254, None, 256)
    assert tokenizer.num_bytes.tolist() == [1] * 256
    with pytest.raises(UsageError, match="no chat template"):
        tokenizer.render_chat([])


@pytest.mark.parametrize(("change", "message"), [
    (lambda tokens, merges, types: (tokens, merges, types, "llama-bpe"), "pre 'llama-bpe' is not reproduced here"),
    (lambda tokens, merges, types: (tokens, merges, types[1:], "smollm"), r"token_type has \d+ entries for \d+"),
    (lambda tokens, merges, types: ([*tokens, "!"], merges, [*types, 1], "smollm"), "has 1 tokens twice"),
    (lambda tokens, merges, types: (tokens, ["q z"], types, "smollm"), "has 'q z', which does not join"),
    (lambda tokens, merges, types: (tokens, merges, [*types[:-1], 6], "smollm"), "token_type 6 of"),
])
def test_vocabularies_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        build_tokenizer(*change(*vocabulary()))


def test_special_tokens_of_a_vocabulary_are_special():
    made = build_tokenizer(*vocabulary(), "smollm")
    assert [made.token_to_id(token) for token in SPECIAL] == [0, 1, 2]
    assert made.encode("the<|end|>").ids[-1] == 2
    assert made.decode([2, 80]) == made.decode([80])  # a special token is left out of plain decoding
