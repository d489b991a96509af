"""Speed of a pretrained language model: a long prompt, and decoding after it, against the transformers library.

  python -m experiments.benchmarks.language_model --workdir=runs/smollm2 [--rows=1,8,32] [--prompt=2048]

Both sides run on the same cores with as many threads, hold the same weights, read the same random tokens and take
turns; logits after the last token of every turn must be equal within rounding, or there is no time. A turn of
"prefill" reads one prompt; a turn of "decode" reads some tokens more after it, one step for each. A ratio is our
time over the rival's, the median over the rounds. A rival that is not installed is left out, and the table says
so: --install makes it an environment, --python FAMILY=PATH names one that is there.
"""
import argparse
import dataclasses
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments import commands
from experiments.benchmarks.decoder import Decoder
from experiments.benchmarks.rivals.contest import Times, Turn, contest
from experiments.benchmarks.rivals.environments import find_interpreter, how_to_install, parse_interpreters
from experiments.benchmarks.rivals.process import NotInstalledError, RivalProcess
from experiments.benchmarks.timing import write_results
from experiments.config.command_line import split_overrides
from experiments.errors import UsageError, run_command
from experiments.export_weights import export_llama
from experiments.pages.tables import markdown_table
from experiments.runs.saved_run import SavedRun

FAMILY, SCRIPT = "transformers", "transformers_llama"
# Of logits, as RMS over RMS: sums in another order, and rounding at every layer. Wrong logits are off by about 1.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
WORK = {"prefill": "prompt of {:,} tokens", "decode": "a step after {:,} tokens"}
PINNING = ("both sides are confined to `cores` (sched_setaffinity), of which XLA makes its thread pool; "
           "torch.set_num_threads, OMP_NUM_THREADS and MKL_NUM_THREADS are `threads`")


def main(argv: list[str]) -> None:
    parser = commands.run_parser(__doc__, "benchmarks.language_model", purpose="to time")
    _add_arguments(parser)
    arguments = parser.parse_args(split_overrides(argv)[0])
    batches, dtypes = _check(arguments)
    interpreter = find_interpreter(FAMILY, parse_interpreters(arguments.python), install=arguments.install)
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.sched_setaffinity(0, cores)  # before jax counts them; rivals inherit it
    with ExitStack() as stack:
        saved = stack.enter_context(SavedRun.from_command_line(parser, argv))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "llama"
        rival = _start(stack, interpreter, arguments.threads)
        if rival is not None:
            export_llama(saved, directory, "float32")
        params, rows = saved.params(), []
        for dtype in dtypes:
            config = dataclasses.replace(saved.config.model, dtype=dtype)
            ours = Decoder(config, params, room=arguments.prompt + arguments.steps * (arguments.rounds + 1))
            if rival is not None:
                rival.call("load", path=str(directory), dtype=dtype)
            rows += measure(ours, rival, batches, arguments)
            path = write_results(  # after each dtype, so that what goes wrong in the next costs no results
                "language_model", rows, arguments.outdir, model=saved.workdir.name, threads=arguments.threads,
                cores=cores, pinning=PINNING, rounds=arguments.rounds, steps_per_turn=arguments.steps,
                rivals={FAMILY: None if rival is None else rival.versions}, note=arguments.note,
                command=shlex.join(["python", "-m", "experiments.benchmarks.language_model", *argv]))
            path.with_suffix(".md").write_text(table(rows) + "\n")


def measure(
    ours: Decoder, rival: RivalProcess | None, batches: list[int], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Times the prompt, then steps after it for every size of batch; returns a row for each."""
    prompt = np.random.default_rng(0).integers(0, ours.config.vocab_size, (1, arguments.prompt), dtype=np.int32)
    rows = [_row("prefill", 1, arguments, ours, lambda: ours.prefill(prompt), rival,
                 lambda: _turn(rival, "prefill", prompt))]
    for size in batches:
        ours.prefill(prompt)
        ours.repeat(size)
        if rival is not None:
            _turn(rival, "prefill", prompt)
            rival.call("repeat", rows=size)
        drawn = [partial(np.random.default_rng(size).integers, 0, ours.config.vocab_size, (size, arguments.steps),
                         dtype=np.int32) for _ in ("ours", "theirs")]  # the same tokens at every turn
        rows.append(_row("decode", size, arguments, ours, lambda draw=drawn[0]: ours.decode(draw()), rival,
                         lambda draw=drawn[1]: _turn(rival, "decode", draw())))
    return rows


def _row(
    work: str, size: int, arguments: argparse.Namespace, ours: Decoder, our_turn: Callable[[], Turn],
    rival: RivalProcess | None, their_turn: Callable[[], Turn],
) -> dict[str, Any]:
    """Times one kind of work of both sides, in milliseconds per prompt or per step."""
    dtype = ours.config.dtype
    case = f"{work}, rows={size}, {dtype}"
    print(case, file=sys.stderr)
    theirs = ratio = cpu_ratio = None
    if rival is None:
        our_turn()  # compiles
        own = Times.of([our_turn() for _ in range(arguments.rounds)])
    else:
        both = contest(case, our_turn, their_turn, rounds=arguments.rounds, tolerance=TOLERANCE[dtype])
        own, theirs, ratio, cpu_ratio = both.ours, both.rival, both.ratio, both.cpu_ratio
    steps = 1 if work == "prefill" else arguments.steps
    row = {"work": work, "rows": size, "prompt": arguments.prompt, "dtype": dtype, "ratio": ratio,
           "cpu_ratio": cpu_ratio}
    for side, times in (("ours", own), ("rival", theirs)):
        row[f"{side}_milliseconds"] = times and 1e3 * times.median / steps
        row[f"{side}_cpu_milliseconds"] = times and 1e3 * statistics.median(times.cpu_seconds) / steps
        row[f"{side}_spread"] = times and [1e3 * seconds / steps for seconds in times.spread]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table in Markdown, in milliseconds per prompt or per step."""
    def spread(row: dict[str, Any], side: str) -> str:
        if row[f"{side}_milliseconds"] is None:
            return "not installed"
        low, high = row[f"{side}_spread"]
        return f"{row[f'{side}_milliseconds']:,.4g} ({low:,.4g} to {high:,.4g})"

    return markdown_table(
        ("work", "rows", "dtype", "ours, ms", f"{FAMILY}, ms", "ratio", "of processor time"),
        [(WORK[row["work"]].format(row["prompt"]), str(row["rows"]), row["dtype"], spread(row, "ours"),
          spread(row, "rival"),
          *("" if row[name] is None else f"{row[name]:.2f}" for name in ("ratio", "cpu_ratio"))) for row in rows])


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", default="1,8,32", help="rows of the batches that decode, such as 1,8,32")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=8, help="tokens of each row in a turn of decoding")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--dtypes", default="float32",
                        help="of weights, activations and caches, such as float32,bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="cores that both sides run on, a thread on each")
    parser.add_argument("--python", action="append", default=[], metavar="FAMILY=PATH",
                        help="an interpreter that has the packages of a family, such as transformers")
    parser.add_argument("--install", action="store_true", help="make the rivals' environments that are missing")
    parser.add_argument("--outdir", type=Path, default=Path("docs/benchmarks"), help="where JSON and table go")
    parser.add_argument("--note", default="", help="a remark for the JSON, such as what else ran on the machine")


def _check(arguments: argparse.Namespace) -> tuple[list[int], list[str]]:
    """Returns the sizes of the batches and the dtypes."""
    for name in ("prompt", "steps", "rounds", "threads"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} {getattr(arguments, name)} must be at least 1")
    try:
        batches = [int(part) for part in arguments.rows.split(",")]
        if min(batches) < 1:
            raise ValueError
    except ValueError:
        raise UsageError(f"--rows={arguments.rows} must be numbers, at least 1 each, such as 1,8,32") from None
    dtypes = arguments.dtypes.split(",")
    if not set(dtypes) <= set(TOLERANCE):
        raise UsageError(f"--dtypes={arguments.dtypes} must be among {', '.join(TOLERANCE)}, with commas between")
    return batches, dtypes


def _start(stack: ExitStack, interpreter: Path | None, threads: int) -> RivalProcess | None:
    """Starts the rival; returns None, which is said, if it is not installed."""
    reason = "no environment"
    if interpreter is not None:
        try:
            return stack.enter_context(RivalProcess(SCRIPT, interpreter, threads=threads))
        except NotInstalledError as error:
            reason = f"{interpreter} lacks {error}"
    print(f"{FAMILY} is left out: {reason}; {how_to_install(FAMILY)}", file=sys.stderr)
    return None


def _turn(rival: RivalProcess, function: str, tokens: np.ndarray) -> Turn:
    answer = rival.call(function, tokens=tokens.tolist())
    return Turn(answer["seconds"], answer["cpu_seconds"], answer["logits"])


if __name__ == "__main__":
    run_command(main)
