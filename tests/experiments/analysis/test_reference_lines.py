import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from experiments.analysis.reference_lines import corpus_reference_lines, reference_lines, sample_bytes
from experiments.data import load_corpus


def _bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def test_lines_match_a_count_by_hand():
    train, test = b"abracadabra, abracadabra", b"cab\xff ar"
    ones, twos = Counter(train), Counter(itertools.pairwise(train))

    def unigram(x: int) -> float:
        return (ones[x] + 1) / (len(train) + 256)

    def bigram(x: int, y: int) -> float:
        return (twos[x, y] + 1) / (sum(count for (first, _), count in twos.items() if first == x) + 256)

    lines = reference_lines(_bytes(train), _bytes(test))
    assert lines["unigram"] == pytest.approx(-sum(math.log2(unigram(x)) for x in test) / len(test))
    pairs = sum(math.log2(bigram(x, y)) for x, y in itertools.pairwise(test))
    assert lines["bigram"] == pytest.approx(-(math.log2(unigram(test[0])) + pairs) / len(test))


def test_text_is_the_more_predictable_the_more_is_seen_of_it():
    text = _bytes(Path(__file__).read_bytes() * 4)
    lines = reference_lines(text[: len(text) // 2], text[len(text) // 2 :])
    assert 8 > lines["unigram"] > lines["bigram"] > lines["zlib"] > 0


def test_noise_costs_eight_bits():
    train, test = np.random.default_rng(0).integers(0, 256, (2, 1 << 18), dtype=np.uint8)
    lines = reference_lines(train, test)
    assert lines["unigram"] == pytest.approx(8, abs=0.01)
    assert lines["zlib"] == pytest.approx(8, abs=0.01)
    assert lines["bigram"] == pytest.approx(8, abs=0.3)  # 65,536 pairs are estimated from 262,143


def test_what_training_never_showed_is_costly_and_finite():
    lines = reference_lines(_bytes(b"a" * 1000), _bytes(b"zzz"))
    assert all(8 <= bits < 30 for bits in lines.values())


def test_a_single_byte_can_be_measured():
    lines = reference_lines(_bytes(b"ab"), _bytes(b"a"))
    assert lines["unigram"] == lines["bigram"] == pytest.approx(-math.log2(2 / 258))


def test_samples_are_whole_documents_up_to_the_limit(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_bytes(bytes([i]) * 10)
    split = load_corpus(f"files:{tmp_path}/*.txt", cache_dir=str(tmp_path / "cache")).split("train")
    sample = sample_bytes(split, 95)
    assert len(sample) == 95
    assert sorted(Counter(sample.tolist()).values()) == [5] + [10] * 9
    everything = sample_bytes(split, 10**6)
    assert len(everything) == split.lengths.sum()
    np.testing.assert_array_equal(everything[:95], sample)


def test_the_training_split_is_what_is_counted_and_the_test_split_what_is_measured(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"{i} some text of its own and some that is common to all")
    corpus = load_corpus(f"files:{tmp_path}/*.txt", cache_dir=str(tmp_path / "cache"))
    samples = [sample_bytes(corpus.split(split), 10**6) for split in ("train", "held_out")]
    assert corpus_reference_lines(corpus) == reference_lines(*samples)
