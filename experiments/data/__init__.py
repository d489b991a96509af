"""Text as bytes: a source is prepared once as a corpus, whose windows are batched by step number."""
from experiments.data.corpus import Corpus, DocumentSplit, load_corpus
from experiments.data.windows import BOS, Batch, BatchSource, EvaluationSource, WindowSource, prefetch

__all__ = [
    "BOS",
    "Batch",
    "BatchSource",
    "Corpus",
    "DocumentSplit",
    "EvaluationSource",
    "WindowSource",
    "load_corpus",
    "prefetch",
]
