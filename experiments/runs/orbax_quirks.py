"""Silence around orbax, which prints and logs about damaged checkpoints in its own way and time."""
import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator

# Nothing else here runs on asyncio. What orbax leaves undone there is logged at some later time, if at all.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def orbax_held_quiet() -> Iterator[None]:
    """Holds back what orbax prints and logs about damage; our own warnings say it in one line."""
    absl = logging.getLogger("absl")
    level, hook = absl.level, sys.unraisablehook
    absl.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None  # coroutines that orbax abandons print whole tracebacks as they die
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # "coroutine ... was never awaited"
            yield
            gc.collect(1)
    finally:
        sys.unraisablehook = hook
        absl.setLevel(level)
