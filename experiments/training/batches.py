"""The text of a run: batches to train on, by step, and a fixed choice of held-out batches."""
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from experiments.config import DataConfig, RunConfig
from experiments.data import (
    BatchSource,
    ByteTokenizer,
    Corpus,
    EvaluationSource,
    Tokenizer,
    WindowSource,
    load_corpus,
)
from experiments.data.token_corpus import TokenCorpus, load_tokens
from experiments.data.tokenizer import check_vocabulary, open_tokenizer
from experiments.data.windows import Documents


class RunData(NamedTuple):
    """The text that a run reads."""
    text: Corpus
    tokenizer: Tokenizer
    corpus: Corpus | TokenCorpus  # the text in tokens, which are bytes for a model of bytes
    batches: BatchSource
    held_out: EvaluationSource


def open_data(config: RunConfig, workdir: Path | None = None) -> RunData:
    """Opens the corpus of a run, preparing it at first, and deals its text out to this process.

    Args:
      workdir: looked in for the tokenizer before the current directory.
    Raises:
      UsageError: the source is missing, unreadable or too small, the tokenizer does not fit the model, or a batch
        does not divide over the processes.
    """
    tokenizer, text, data = open_run_tokenizer(config, workdir), open_corpus(config.data), config.data
    corpus = in_tokens(text, tokenizer)
    windows = WindowSource(corpus.split("train"), data.sequence_length, config.seed, loss_marker=data.loss_marker,
                           tokenizer=tokenizer)
    batches = BatchSource(
        windows, data.batch_size, seed=config.seed,
        process_index=jax.process_index(), process_count=jax.process_count())
    return RunData(text, tokenizer, corpus, batches, held_out_batches(config, corpus, tokenizer))


def held_out_batches(config: RunConfig, corpus: Corpus | TokenCorpus, tokenizer: Tokenizer) -> EvaluationSource:
    """Chooses `config.eval_bytes` held-out bytes, the same each time, spread over the documents.

    Args:
      corpus: in tokens, as `in_tokens` gives it.
    """
    data = config.data
    windows = WindowSource(corpus.split("held_out"), data.sequence_length, seed=0, loss_marker=data.loss_marker,
                           tokenizer=tokenizer)
    return EvaluationSource(
        windows, data.batch_size, num_bytes=config.eval_bytes,
        process_index=jax.process_index(), process_count=jax.process_count())


def all_batches(config: RunConfig, documents: Documents, tokenizer: Tokenizer) -> EvaluationSource:
    """Returns every window of `documents`, which are in tokens, in batches as `held_out_batches` makes them."""
    data = config.data
    windows = WindowSource(documents, data.sequence_length, seed=0, loss_marker=data.loss_marker,
                           tokenizer=tokenizer)
    return EvaluationSource(windows, data.batch_size, num_bytes=sys.maxsize)


def open_corpus(data: DataConfig) -> Corpus:
    """Opens the corpus that a config names, and prepares it on first use."""
    return load_corpus(data.source, text_key=data.text_key, cache_dir=data.cache_dir)


def in_tokens(text: Corpus, tokenizer: Tokenizer) -> Corpus | TokenCorpus:
    """Returns a corpus whose documents are ids of `tokenizer`; encodes it on first use, unless ids are bytes."""
    return text if isinstance(tokenizer, ByteTokenizer) else load_tokens(text, tokenizer)


def open_run_tokenizer(config: RunConfig, workdir: Path | None = None) -> Tokenizer:
    """Opens the tokenizer of a run; raises UsageError if it is missing or has more ids than the model."""
    name = config.data.tokenizer
    tokenizer = open_tokenizer(name, workdir=workdir)
    if name:  # a model of bytes is checked where its config is made
        check_vocabulary(tokenizer, config.model.vocab_size, name)
    return tokenizer
