"""Measurements on models and text.

  boundaries        where a model cuts a text
  chunked_text      a text and its chunks, byte by byte
  chunk_statistics  what its boundaries coincide with
  perturbations     how they move under edits
  attention_rows    weights of single attention heads
  heads             what heads copy: python -m experiments.analysis heads
  flops             counts operations of a program
  reference_lines   unigram, bigram and zlib on the same text
"""
