"""Parsers of command lines: each prints the docstring of its command as help and takes no abbreviations."""
import argparse


def parser(docstring: str, name: str) -> argparse.ArgumentParser:
    """Returns a parser without arguments for `python -m experiments.<name>`."""
    return argparse.ArgumentParser(
        prog=f"python -m experiments.{name}", description=docstring, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)


def run_parser(docstring: str, name: str, *, purpose: str) -> argparse.ArgumentParser:
    """Returns a parser with the arguments that name a checkpoint: --workdir and --step.

    Args:
      purpose: completes "the checkpoint", as in "to evaluate".
    """
    made = parser(docstring, name)
    add_run_arguments(made, purpose=purpose)
    return made


def add_run_arguments(to: argparse.ArgumentParser, *, purpose: str) -> None:
    """Adds --workdir and --step; see `run_parser`."""
    to.add_argument("--workdir", required=True, help="a run that saved a checkpoint")
    to.add_argument("--step", type=int, help=f"the checkpoint {purpose}; the newest by default")
