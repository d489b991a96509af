"""Configs: what a run is made of, and how files and command lines say it.

  run           the dataclasses of a training run; those of the synthetic tasks are in experiments/tasks/config.py
  files         finds a config by its name, writes it as JSON and reads that again
  codec         config dataclasses as plain values and back
  command_line  sets fields by their paths
  migration     what earlier versions saved, as of today
  schema        the fields of config classes, read off their annotations
"""
from experiments.config.run import DataConfig, OptimizerConfig, RunConfig

__all__ = ["DataConfig", "OptimizerConfig", "RunConfig"]
