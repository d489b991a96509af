"""Other people's packages, timed against ours: each in an interpreter of its own, its results checked first.

  environments   a virtual environment for every family of packages that fit into one
  process        a rival's process, which answers lines of JSON
  contest        two sides take turns; unequal results are an error
  scripts/       programs that run in the rivals' environments and import nothing of ours

A rival is one script: it makes functions of plain values, and hands them to `serve` (scripts/serve.py).
"""
