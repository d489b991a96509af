"""Looks inside a model: its chunks of a text, the places of its boundaries, and the effects of small changes.

  python -m experiments.inspect --workdir=runs/quickstart (--text=TEXT | --file=PATH) [--show=N] [--html=PATH]
      [--step=N] [--config.FIELD=VALUE]

The terminal shows the chunks of every stage in colour, or cut by "|" without colours (a pipe, NO_COLOR), and the
statistics; the page has the whole text with the probability of every boundary. A model of tokens shows its tokens
besides, each with its nats. Words are explained in
experiments/analysis/chunk_statistics.py and experiments/analysis/perturbations.py.
"""
import os
import sys
import textwrap
from pathlib import Path

from experiments import commands
from experiments.analysis.boundaries import chunk_texts
from experiments.analysis.chunk_statistics import bits_per_byte, place_table, stage_statistics, stage_table
from experiments.analysis.perturbations import effect_table, effects, perturb
from experiments.config.command_line import split_overrides
from experiments.errors import UsageError, run_command
from experiments.pages.inspect import PLACES_LEGEND, Inspection, effects_legend, render_inspection
from experiments.pages.terminal import open_console, print_chunks, print_tokens, table_in_terminal
from experiments.runs.progress import Progress
from experiments.runs.saved_run import SavedRun

PERTURBED_BYTES = 20_000  # of the text, of which eight changed copies are read


def main(argv: list[str]) -> None:
    parser = commands.run_parser(__doc__, "inspect", purpose="to look into")
    parser.add_argument("--text", help="the text to read")
    parser.add_argument("--file", help="a file to read instead, of any bytes")
    parser.add_argument("--show", type=int, default=2000, help="bytes to show in the terminal")
    parser.add_argument("--html", help="the page to write; inspect.html in the workdir by default")
    arguments = parser.parse_args(split_overrides(argv)[0])
    if arguments.show < 0:
        raise UsageError(f"--show {arguments.show} must not be negative")
    title, text = _read_text(arguments.text, arguments.file)
    with SavedRun.from_command_line(parser, argv) as saved:
        inspection = inspect_text(saved, title, text)
    page = Path(arguments.html).expanduser() if arguments.html else saved.workdir / "inspect.html"
    try:
        page.write_text(render_inspection(inspection), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html={page}: cannot write there ({error.strerror}); name another file") from error
    _print(inspection, arguments.show)
    print(f"page: {page}")


def inspect_text(saved: SavedRun, title: str, text: bytes) -> Inspection:
    """Reads a text of at least one byte, and the changes of its beginning, in one pass of the model over all."""
    tokenizer = saved.tokenizer()
    # A letter in the other case may have a byte that no token stands for; one of the text itself is refused.
    perturbed = [(name, tokenizer.without_unwritable(changed))
                 for name, changed in perturb(text[:PERTURBED_BYTES])]
    with Progress(0, unit="call", file=sys.stderr) as progress:
        chunked, *changed = chunk_texts(
            saved.config, saved.params(), [(title, text), *perturbed], tokenizer, on_call=progress.seldom)
    stages = tuple(stage_statistics(text, stage) for stage in chunked.stages)
    return Inspection(
        saved.workdir.name, saved.step, chunked, stage_table(stages), tuple(map(place_table, stages)),
        effect_table(effects(changed), tuple(stage.name for stage in stages)),
        num_perturbed=min(len(text), PERTURBED_BYTES))


def _read_text(text: str | None, file: str | None) -> tuple[str, bytes]:
    """Returns (title, text) from the one of --text and --file that was given."""
    if (text is None) == (file is None):
        raise UsageError(f"{'neither' if text is None else 'both'} of --text=TEXT and --file=PATH given; give one")
    if text is not None:
        # On a command line, Python stands bytes that are not UTF-8 in for by lone surrogates.
        content, source, title = os.fsencode(text), "--text", "text"
    else:
        source, title = f"--file={file}", Path(file).name
        try:
            content = Path(file).expanduser().read_bytes()
        except OSError as error:
            raise UsageError(f"{source}: cannot be read ({error.strerror})") from error
    if not content:
        raise UsageError(f"{source} is empty; a text of at least one byte is needed")
    return title, content


def _print(inspection: Inspection, num_shown: int) -> None:
    # Not every output has the marks and letters that a text may have; without this it would end the command.
    sys.stdout.reconfigure(errors="backslashreplace")
    chunked = inspection.chunked
    print(f"step {inspection.step}, {chunked.title}: {len(chunked.text):,} bytes, "
          f"{bits_per_byte(chunked):.3f} bits per byte\n")
    if chunked.token_starts is not None:
        print_tokens(chunked, open_console(), num_shown=num_shown)
    if chunked.stages:
        print_chunks(chunked, open_console(), num_shown=num_shown)
        print(table_in_terminal(inspection.stages))
    else:
        print(f"{inspection.no_stages}\n")
    for table in inspection.places:
        print(table_in_terminal(table))
    if inspection.places:
        print(f"{textwrap.fill(PLACES_LEGEND, 100)}\n")
    print(table_in_terminal(inspection.effects))
    print(f"{textwrap.fill(effects_legend(inspection), 100)}\n")


if __name__ == "__main__":
    run_command(main)
