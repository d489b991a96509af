"""Analyses of trained models.

  python -m experiments.analysis heads --workdir=RUN     which attention heads copy; see heads.py beside this file
"""
from experiments.analysis import heads
from experiments.errors import UsageError, run_command, suggest

COMMANDS = {"heads": heads.main}


def main(argv: list[str]) -> int | None:
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    given = f"{argv[0]!r} is no analysis{suggest(argv[0], COMMANDS)}" if argv else "no analysis is named"
    raise UsageError(f"{given}; there is {', '.join(COMMANDS)}; python -m experiments.analysis heads --help")


if __name__ == "__main__":
    run_command(main)
