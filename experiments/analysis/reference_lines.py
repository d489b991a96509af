"""Reference lines for a byte model: bits per byte of predictors that need almost no training.

  unigram  each byte by its frequency in the training text
  bigram   each byte by its frequency after the byte before it; the first byte of the sample by the unigram
  zlib     size of the held-out sample compressed as a whole at level 9; it sees no training text, but up to
           32 KiB before each byte, more than a window of the quick-start model

Unigram and bigram counts start from one (add-one smoothing), so a pair never seen in training costs many bits
rather than infinitely many. A model that has learned anything beyond letter pairs is below "bigram".
"""
import zlib

import numpy as np

from experiments.data import Corpus, DocumentSplit

TRAIN_BYTES = 8_000_000
HELD_OUT_BYTES = 1_000_000


def corpus_reference_lines(corpus: Corpus) -> dict[str, float]:
    """Measures on at most 1 MB of held-out text, counting at most 8 MB of training text."""
    train, held_out = corpus.split("train"), corpus.split("held_out")
    return reference_lines(sample_bytes(train, TRAIN_BYTES), sample_bytes(held_out, HELD_OUT_BYTES))


def reference_lines(train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Returns {"unigram", "bigram", "zlib"} in bits per byte of `held_out`; both are uint8 [n], n >= 1."""
    unigram = np.bincount(train, minlength=256) + 1
    pairs = np.bincount(_pairs(train), minlength=256 * 256).reshape(256, 256) + 1
    unigram_bits = -np.log2(unigram / unigram.sum())
    pair_bits = -np.log2(pairs / pairs.sum(axis=1, keepdims=True))
    return {
        "unigram": float(unigram_bits[held_out].mean()),
        "bigram": float((unigram_bits[held_out[0]] + pair_bits.ravel()[_pairs(held_out)].sum()) / len(held_out)),
        "zlib": 8 * len(zlib.compress(held_out.tobytes(), level=9)) / len(held_out),
    }


def sample_bytes(split: DocumentSplit, limit: int) -> np.ndarray:
    """Joins documents, in a fixed random order and without BOS, up to `limit` bytes: uint8 [<= limit]."""
    pieces, left = [], limit
    for document in np.random.RandomState(0).permutation(len(split.lengths)):
        pieces.append(split.read(document, 0, min(int(split.lengths[document]), left)))
        left -= len(pieces[-1])
        if not left:
            break
    return np.concatenate(pieces)


def _pairs(text: np.ndarray) -> np.ndarray:
    """Returns 256 * byte + next byte for every position but the last, uint16 [n - 1]."""
    return text[:-1].astype(np.uint16) * 256 + text[1:]
