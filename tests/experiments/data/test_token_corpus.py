"""A corpus in tokens: encoded once, read in windows as bytes are, every byte of text counted."""
import numpy as np
import pytest

from experiments.data import (
    BOS,
    BatchSource,
    ByteTokenizer,
    EvaluationSource,
    WindowSource,
    load_corpus,
    open_tokenizer,
)
from experiments.data.source_text import DocumentList
from experiments.data.token_corpus import load_tokens
from experiments.errors import UsageError
from tests.support.small_tokenizer import write_tokenizer

TEXTS = [b"the end of a line\n", b" importing 12 things", "grün and ".encode() * 9, b"\xfe\xfe the", b"x",
         b"return self 1234567"]


@pytest.fixture(scope="module", params=[False, True], ids=["no bos", "bos"])
def tokenizer(request, tmp_path_factory):
    return open_tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), add_bos_token=request.param)))


def _windows(tokenizer, length: int, texts: list[bytes] = TEXTS, **options) -> WindowSource:
    split = DocumentList([""] * len(texts), [tokenizer.encode(text) for text in texts])
    return WindowSource(split, length, seed=0, tokenizer=tokenizer, **options)


def _is_target(window: dict[str, np.ndarray]) -> np.ndarray:
    ids = window["segment_ids"]
    is_target = (ids[..., 1:] > 0) & (ids[..., 1:] == ids[..., :-1])
    return is_target & window["loss_mask"][..., 1:] if "loss_mask" in window else is_target


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_every_token_after_a_documents_first_is_predicted_once(tokenizer, length):
    windows = _windows(tokenizer, length)
    order = np.random.RandomState(0).permutation(len(TEXTS))
    first = int(tokenizer.bos is None)  # without BOS nothing stands before a document's first token
    expected = [tokenizer.encode(TEXTS[document])[first:] for document in order]
    found = [windows[index]["tokens"][1:][_is_target(windows[index])] for index in range(len(windows))]
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))
    counted = windows.num_bytes(np.arange(len(windows)))
    assert counted.tolist() == [tokenizer.num_bytes[ids].sum() for ids in found]
    if tokenizer.bos is not None:
        assert counted.sum() == sum(map(len, TEXTS))


def test_windows_say_what_bytes_their_tokens_stand_for(tokenizer):
    (window,) = _windows(tokenizer, 300, [b"the end<|end|> of"])
    ids = tokenizer.encode(b"the end<|end|> of").tolist()
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    num_tokens = len(bos) + len(ids)
    assert window["tokens"][:num_tokens].tolist() == bos + ids
    assert window["num_bytes"][:num_tokens].tolist() == [0] * len(bos) + tokenizer.num_bytes[ids].tolist()
    assert not window["num_bytes"][num_tokens:].any() and not window["segment_ids"][num_tokens:].any()
    assert window["num_bytes"].dtype == np.int32
    # In the middle of a document there is no BOS, whatever the token there is.
    later = _windows(tokenizer, 3, [b"the<|user|>end"])[1]
    assert later["is_continuation"] and (later["num_bytes"][later["segment_ids"] > 0] > 0).all()


def test_a_window_of_bytes_has_no_byte_counts():
    split = DocumentList(["a"], [ByteTokenizer().encode(b"text")])
    (window,) = WindowSource(split, 8, seed=0)
    assert window.keys() == {"tokens", "segment_ids", "is_continuation"} and window["tokens"][0] == BOS


@pytest.mark.parametrize("length", [1, 5, 1000])
def test_what_begins_after_the_marker_is_predicted(tokenizer, length):
    texts = [b"12 in the text", b"none", b"t and a and b", b" and", b"importing and"]
    windows = _windows(tokenizer, length, texts, loss_marker=b" an")  # the marker ends within the token " and"
    order = np.random.RandomState(0).permutation(len(texts))
    expected = [b" a and b" if index == 2 else b"" for index in order]
    found = [tokenizer.decode(windows[index]["tokens"][1:][_is_target(windows[index])])
             for index in range(len(windows))]
    assert b"".join(found) == b"".join(expected)
    assert windows.num_bytes(np.arange(len(windows))).tolist() == list(map(len, found))
    with pytest.raises(UsageError, match="loss_after 'nowhere': none of the 5 documents"):
        _windows(tokenizer, 5, texts, loss_marker=b"nowhere")


def test_evaluation_takes_the_bytes_that_were_asked_for(tokenizer):
    windows = _windows(tokenizer, 4)
    evaluation = EvaluationSource(windows, 3, num_bytes=40)
    batches = list(evaluation)
    predicted = sum((batch["num_bytes"][:, 1:] * _is_target(batch)).sum() for batch in batches)
    assert predicted == evaluation.num_bytes and 40 <= predicted < 80
    everything = EvaluationSource(windows, 3, num_bytes=10**9)
    assert everything.num_bytes == windows.num_bytes(np.arange(len(windows))).sum()


def test_texts_that_leave_nothing_to_predict_are_refused(tokenizer):
    if tokenizer.bos is not None:
        pytest.skip("after BOS there is always a token to predict")
    with pytest.raises(UsageError, match="a single token of text"):
        _windows(tokenizer, 4, [b"a"])
    with pytest.raises(UsageError, match="no document has a second token"):
        EvaluationSource(_windows(tokenizer, 4, [b"a", b"b"]), 1, num_bytes=9)


# Corpora


@pytest.fixture
def corpus(tmp_path):
    for number in range(60):
        text = (TEXTS[number % len(TEXTS)] + b"%d " % number) * 3 + b"\x04\xff" * (number == 7)
        (tmp_path / f"{number}.txt").write_bytes(text)
    (tmp_path / "unwritable.txt").write_bytes(b"\x04\x04\x04")
    return load_corpus(f"files:{tmp_path}/*.txt", cache_dir=str(tmp_path / "cache"))


def test_a_corpus_is_encoded_once_and_read_by_document(corpus, tokenizer, capsys):
    capsys.readouterr()
    encoded = load_tokens(corpus, tokenizer)
    assert "left out 5 bytes that no token stands for" in capsys.readouterr().out
    num_tokens = 0
    for name in ("train", "held_out"):
        text, tokens = corpus.split(name), encoded.split(name)
        kept = [index for index, path in enumerate(text.names) if "unwritable" not in path]
        assert tokens.names == [text.names[index] for index in kept]
        for document, index in enumerate(kept):
            content = text.read(index, 0, int(text.lengths[index])).tobytes()
            ids = tokens.read(document, 0, int(tokens.lengths[document]))
            assert tokenizer.decode(ids) == tokenizer.without_unwritable(content)
            np.testing.assert_array_equal(tokens.read(document, 2, 5), ids[2:5])
        num_tokens += int(tokens.lengths.sum())
    assert encoded.fingerprint == corpus.fingerprint | {
        "tokenizer": tokenizer.fingerprint, "tokens": num_tokens, "unwritable_bytes": 5}
    with pytest.raises(IndexError, match="are not within the"):
        encoded.split("train").read(0, 0, 10**6)
    again = load_tokens(corpus, tokenizer)
    assert again.fingerprint == encoded.fingerprint and capsys.readouterr().out == ""


def test_another_tokenizer_encodes_anew_and_an_interrupted_one_leaves_nothing(corpus, tmp_path, monkeypatch):
    first, second = (open_tokenizer(str(write_tokenizer(tmp_path / pre, pre=pre))) for pre in ("smollm", "gpt-2"))
    before = set(corpus.directory.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(type(first), "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_tokens(corpus, first)
    assert set(corpus.directory.parent.iterdir()) == before
    assert load_tokens(corpus, first).fingerprint != load_tokens(corpus, second).fingerprint
    assert len(set(corpus.directory.parent.iterdir()) - before) == 2


def test_batches_of_a_corpus_in_tokens_are_those_of_its_documents(corpus, tokenizer):
    split = load_tokens(corpus, tokenizer).split("train")
    batch = BatchSource(WindowSource(split, 16, seed=1, tokenizer=tokenizer), 4, seed=2)[3]
    documents = DocumentList(split.names, [
        split.read(index, 0, int(length)) for index, length in enumerate(split.lengths)])
    other = BatchSource(WindowSource(documents, 16, seed=1, tokenizer=tokenizer), 4, seed=2)[3]
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name])
    assert batch["tokens"].dtype == np.int32
