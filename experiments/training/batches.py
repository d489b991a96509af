"""The text of a run: batches to train on, by step, and a fixed choice of held-out batches."""
from typing import NamedTuple

import jax

from experiments.config import DataConfig, RunConfig
from experiments.data import BatchSource, Corpus, EvaluationSource, WindowSource, load_corpus


class RunData(NamedTuple):
    """The text that a run reads."""
    corpus: Corpus
    batches: BatchSource
    held_out: EvaluationSource


def open_data(config: RunConfig) -> RunData:
    """Opens the corpus of a run, preparing it at first, and deals its text out to this process.

    Raises:
      UsageError: the source is missing, unreadable or too small, or a batch does not divide over the processes.
    """
    corpus, data = open_corpus(config.data), config.data
    windows = WindowSource(corpus.split("train"), data.sequence_length, config.seed, loss_marker=data.loss_marker)
    batches = BatchSource(
        windows, data.batch_size, seed=config.seed,
        process_index=jax.process_index(), process_count=jax.process_count())
    return RunData(corpus, batches, held_out_batches(config, corpus))


def held_out_batches(config: RunConfig, corpus: Corpus) -> EvaluationSource:
    """Chooses `config.eval_bytes` held-out bytes, the same each time, spread over the documents."""
    data = config.data
    windows = WindowSource(corpus.split("held_out"), data.sequence_length, seed=0, loss_marker=data.loss_marker)
    return EvaluationSource(
        windows, data.batch_size, num_bytes=config.eval_bytes,
        process_index=jax.process_index(), process_count=jax.process_count())


def open_corpus(data: DataConfig) -> Corpus:
    """Opens the corpus that a config names, and prepares it on first use."""
    return load_corpus(data.source, text_key=data.text_key, cache_dir=data.cache_dir)
