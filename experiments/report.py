"""Draws runs/<name>/report.html: one file that shows what a run learned and where it cuts text.

  python -m experiments.report --workdir=runs/quickstart
"""
import json
from pathlib import Path

from experiments import commands
from experiments.analysis.boundaries import chunk_texts
from experiments.config.files import saved_fields
from experiments.data import Corpus
from experiments.errors import run_command
from experiments.generate import generate_bytes
from experiments.pages.report import ReportData, render_report
from experiments.runs.metrics import read_metrics
from experiments.runs.saved_run import Run, open_run, restore_run
from hnet import Sampling

TEXT_BYTES = 1500
SAMPLE_BYTES = 160
PROMPTS = ("def ", "class ", "The ")


def main(argv: list[str]) -> None:
    parser = commands.run_parser(__doc__, "report", purpose="to show")
    print(_write(open_run(parser, argv)))


def write_report(workdir: Path) -> Path:
    """Writes the report of the newest checkpoint in `workdir` and returns its path."""
    return _write(restore_run(workdir))


def _write(run: Run) -> Path:
    manifest = json.loads((run.workdir / "manifest.json").read_text())
    rows = generate_bytes(run.config, run.params, [prompt.encode() for prompt in PROMPTS], length=SAMPLE_BYTES,
                          sampling=Sampling(temperature=0.7))
    samples = tuple(zip(PROMPTS, map(bytes, zip(*rows, strict=True)), strict=True))
    page = render_report(ReportData(
        name=run.workdir.name,
        config=saved_fields(run.config),
        manifest=manifest,
        metrics=read_metrics(run.workdir / "metrics.jsonl"),
        reference_lines=manifest["reference_lines"],
        texts=chunk_texts(run.config, run.params, held_out_texts(run.corpus())),
        samples=samples,
    ))
    path = run.workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def held_out_texts(corpus: Corpus, limit: int = 3) -> list[tuple[str, bytes]]:
    """The beginning of one held-out document of each kind (its folder or file ending), the longest kinds first."""
    split = corpus.split("held_out")
    chosen: dict[str, int] = {}
    for index in sorted(range(len(split.names)), key=lambda index: split.names[index]):
        kind = Path(split.names[index]).suffix or Path(split.names[index]).parts[0]
        best = chosen.setdefault(kind, index)
        if split.lengths[best] < TEXT_BYTES < split.lengths[index]:
            chosen[kind] = index
    longest = sorted(chosen.values(), key=lambda index: -int(split.lengths[index]))[:limit]
    beginnings = (split.read(index, 0, min(TEXT_BYTES, int(split.lengths[index]))) for index in longest)
    return [(f"held out: {split.names[index]}", text.tobytes())
            for index, text in zip(longest, beginnings, strict=True)]


if __name__ == "__main__":
    run_command(main)
