"""How a command ends: 0 done, 2 the caller's mistake in one line, 143 stopped by SIGTERM."""
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class UsageError(Exception):
    """A mistake of the caller: what came, what fits, which field to change. Printed as one line."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the choice nearest to `name`, or "" if none is near."""
    near = get_close_matches(name, list(choices), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(arguments)` and exits; a UsageError becomes one line on stderr and exit code 2."""
    try:
        code = main(sys.argv[1:])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
