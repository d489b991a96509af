"""Text as bytes or tokens: a source is prepared once as a corpus, whose windows are batched by step number."""
from experiments.data.corpus import Corpus, DocumentSplit, load_corpus
from experiments.data.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from experiments.data.windows import Batch, BatchSource, EvaluationSource, WindowSource, prefetch
from hnet import BOS

__all__ = [
    "BOS",
    "Batch",
    "BatchSource",
    "ByteTokenizer",
    "Corpus",
    "DocumentSplit",
    "EvaluationSource",
    "Tokenizer",
    "WindowSource",
    "load_corpus",
    "open_tokenizer",
    "prefetch",
]
