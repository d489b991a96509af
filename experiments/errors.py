"""Exit codes of commands: 0 done, 1 failed, 2 the caller's mistake, 141 output no longer read, 143 SIGTERM."""
import logging
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class UsageError(Exception):
    """A mistake of the caller: what came, what fits, which field to change. Printed as one line."""


class RunError(Exception):
    """A failure of the run itself, which its arguments did not cause. Printed as one line."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the choice nearest to `name`, or "" if none is near."""
    near = get_close_matches(name, list(choices), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(arguments)` and exits with what it returns, or with the code of the error it raised."""
    # Forced: libraries set up a format of their own as they are imported.
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    try:
        code = main(sys.argv[1:])
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; what is left to print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
