"""Draws runs/<name>/report.html: one file that shows the training of a run and its chunks.

  python -m experiments.report --workdir=runs/quickstart
"""
import json
from pathlib import Path

from experiments import commands
from experiments.analysis.boundaries import chunk_texts
from experiments.config.files import saved_fields
from experiments.data import Corpus
from experiments.errors import run_command
from experiments.generate import generate_pieces, prompt_ids
from experiments.pages.report import ReportData, render_report
from experiments.runs.metrics import read_metrics
from experiments.runs.saved_run import SavedRun
from hnet import Sampling

TEXT_BYTES = 1500
SAMPLE_TOKENS = {"byte": 160, "token": 50}
PROMPTS = ("def ", "class ", "The ")


def main(argv: list[str]) -> None:
    parser = commands.run_parser(__doc__, "report", purpose="to show")
    with SavedRun.from_command_line(parser, argv) as saved:
        print(_write(saved))


def write_report(workdir: Path) -> Path:
    """Writes the report of the newest checkpoint in `workdir` and returns its path."""
    with SavedRun.open(workdir) as saved:
        return _write(saved)


def _write(saved: SavedRun) -> Path:
    config, params = saved.config, saved.params()
    manifest = json.loads((saved.workdir / "manifest.json").read_text())
    tokenizer = saved.tokenizer()
    pieces = generate_pieces(
        config, params, [prompt_ids(tokenizer, prompt.encode()) for prompt in PROMPTS], tokenizer,
        length=SAMPLE_TOKENS[tokenizer.unit], sampling=Sampling(temperature=0.7))
    samples = tuple(zip(PROMPTS, map(b"".join, zip(*pieces, strict=True)), strict=True))
    page = render_report(ReportData(
        name=saved.workdir.name,
        config=saved_fields(config),
        manifest=manifest,
        metrics=read_metrics(saved.workdir / "metrics.jsonl"),
        reference_lines=manifest["reference_lines"],
        texts=chunk_texts(config, params, [
            (title, tokenizer.without_unwritable(text)) for title, text in held_out_texts(saved.corpus())],
            tokenizer),
        samples=samples,
    ))
    path = saved.workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def held_out_texts(corpus: Corpus, limit: int = 3) -> list[tuple[str, bytes]]:
    """Returns the beginning of a held-out document of each kind (folder or file ending), the longest first."""
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
