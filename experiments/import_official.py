"""Points to `experiments.import_weights hnet`, which does this now, and fails."""
from experiments.errors import UsageError, run_command


def main(argv: list[str]) -> None:
    raise UsageError("this command is now `python -m experiments.import_weights hnet`; "
                     "python -m experiments.import_weights --help")


if __name__ == "__main__":
    run_command(main)
