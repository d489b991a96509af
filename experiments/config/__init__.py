"""Configs: what a run is made of, and how files and command lines say it.

  run    the dataclasses
  files  finds a config by its name, sets fields from the command line, JSON
"""
from experiments.config.run import DataConfig, OptimizerConfig, RunConfig

__all__ = ["DataConfig", "OptimizerConfig", "RunConfig"]
