"""A run on disk.

  saved_run    opens a run again
  start        the state that training begins with
  checkpoints  saves and restores, with checksums
  checksums    one number per array
  grid         experiments of many runs: means, origin, files
  manifest     who made the run, with what
  metrics      metrics.jsonl and TensorBoard
  progress     lines and bars on the console
"""
