"""Tests how a language model uses a long context, on texts of exact lengths.

  python -m experiments.tasks longcontext --workdir=runs/smollm2 [--lengths=512,1024,2048,4096,8192] [--draws=4]
      [--tasks=needle,multi_needle,key_value,copy,position] [--question=outside] [--source=topics] [--outdir=DIR]

A length counts a context with its question and answer. Tests are explained in
experiments/tasks/longcontext/generators.py, scores in scores.py beside it. --draws is a number, or one per length.

DIR/ gets contexts/ (a file per finished context), results.json (all of them), summary.json (settings, scores,
costs), table.md, plot.svg and longcontext.html. The same command again reads only contexts that are not finished.
"""
import argparse
import json
import signal
from collections.abc import Mapping
from pathlib import Path

from experiments import commands
from experiments.config.command_line import split_overrides
from experiments.config.files import saved_fields
from experiments.config.run import check_choice
from experiments.errors import UsageError
from experiments.files import write_whole
from experiments.runs.grid import save_result, write_findings
from experiments.runs.manifest import prepare_workdir, write_manifest
from experiments.runs.progress import Progress
from experiments.runs.saved_run import SavedRun
from experiments.tasks.longcontext.examples import ROOM
from experiments.tasks.longcontext.generators import KEYS, TASKS, Choices, Maker
from experiments.tasks.longcontext.page import render_plot, render_suite_page, render_table
from experiments.tasks.longcontext.prose import TOPICS, Prose
from experiments.tasks.longcontext.reader import Compress, ModelReader
from experiments.tasks.longcontext.run_checks import check_context
from experiments.tasks.longcontext.scores import Score, score_all, summary
from experiments.tasks.longcontext.suite import (
    ContextName,
    Plan,
    Result,
    Settings,
    evaluate,
    load,
    plan,
    shared_contexts,
)

PLACES = ("outside", "inside")


def main(argv: list[str], *, compress: Compress | None = None, method: str = "none") -> int:
    """Runs the suite.

    Args:
      compress: of a state, see `ModelReader`.
      method: its name among the settings, which results of another one are not mixed with.
    """
    arguments = _parser().parse_args(split_overrides(argv)[0])
    draws, tasks = _draws(arguments), _tasks(arguments.tasks)
    choices = _choices(arguments)
    saved = SavedRun.from_command_line(_parser(), argv)
    with saved:
        check_context(saved, max(draws), "--lengths")
        tokenizer = saved.tokenizer()
        held_out = arguments.source == saved.config.data.source
        prose = Prose.of_source(arguments.source, tokenizer, seed=choices.seed, held_out=held_out)
        make = Maker(prose, tokenizer, choices)
        contexts, settings = plan(make, tasks, draws), _settings(arguments, saved, make, method)
        outdir = Path(arguments.outdir or saved.workdir / "longcontext").expanduser().absolute()
        finished = {name: load(name, outdir, settings) for name in contexts}
        if not all(finished.values()) and not arguments.report_only:
            prepare_workdir(outdir)
            try:
                _run(saved, contexts, finished, settings, outdir, arguments.question, compress)
            except KeyboardInterrupt:
                print("stopped; the same command continues with the contexts that are not finished", flush=True)
                return 128 + signal.SIGINT
        elif all(finished.values()):
            print("all contexts were finished before", flush=True)
    _write(outdir, finished, settings, saved)
    return 0


def _run(
    saved: SavedRun, contexts: Plan, finished: dict[ContextName, Result | None], settings: Settings,
    outdir: Path, question: str, compress: Compress | None,
) -> None:
    """Reads what is not `finished`, writes it and adds it there."""
    fields = saved_fields(settings)
    manifest = write_manifest(outdir, config=fields)
    origin = {"commit": manifest["git"]["commit"], "is_dirty": manifest["git"].get("is_dirty", False),
              "device": manifest["device_kind"], "versions": manifest["versions"], "config": fields}
    params, reader, length = saved.params(), None, 0
    missing = {name: examples for name, examples in contexts.items() if finished[name] is None}
    print(f"{len(contexts)} contexts, {len(contexts) - len(missing)} of them finished before", flush=True)
    done = 0
    with Progress(len(missing)) as progress:
        for group in shared_contexts(missing):
            if group[0][0].length != length:
                del reader  # its programs and the state of its last context
                length = group[0][0].length
                reader = ModelReader(saved.config.model, params, length, compress=compress, question=question)
                progress.message(f"{length:,} tokens: compiled in {reader.compile_seconds:.1f} s")
            for result in evaluate(reader, group, origin):
                save_result(result, outdir)
                finished[result.name] = result
                done += 1
                progress.message(f"{result.name}: {result.summary}; {result.read_seconds:.1f} s")
            progress.update(done, {"tokens": f"{length:,}"})


def _write(
    outdir: Path, finished: Mapping[ContextName, Result | None], settings: Settings, saved: SavedRun
) -> None:
    results = [result for result in finished.values() if result]
    scores: list[Score] = score_all(
        results, vocab_size=saved.config.model.vocab_size, num_pairs=settings.pairs)
    write_findings(
        outdir, finished, "results.json", lambda _: (render_table(results, scores), render_plot(scores)))
    write_whole(outdir / "summary.json", json.dumps(summary(results, settings, scores), indent=2) + "\n")
    page = outdir / "longcontext.html"
    write_whole(page, render_suite_page(saved.workdir.name, saved.step, results, scores, settings))
    print(f"{outdir / 'summary.json'}, page: {page}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = commands.run_parser(__doc__, "tasks longcontext", purpose="to test")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192", help="tokens, with commas")
    parser.add_argument("--tasks", default=",".join(TASKS), help="tests, with commas; all by default")
    parser.add_argument("--draws", default="4", help="texts per length: a number, or one per length with commas")
    parser.add_argument("--depths", default="0.05,0.25,0.5,0.75,0.95", help="of the needle, with commas")
    parser.add_argument("--pairs", type=int, default=Choices().num_pairs, help="of the test key_value")
    parser.add_argument("--seed", type=int, default=0, help="of texts, facts and codes")
    parser.add_argument("--question", default="outside", choices=PLACES,
                        help="whether questions are read after compression, or belong to the compressed part")
    parser.add_argument("--source", default=TOPICS, help="of the text: topics, or a source of experiments.data")
    parser.add_argument("--outdir", help="the directory of the results; longcontext in the workdir by default")
    parser.add_argument("--report_only", action="store_true", help="read nothing, draw what is finished")
    return parser


def _draws(arguments: argparse.Namespace) -> dict[int, int]:
    """Returns the number of draws by length."""
    lengths = _numbers("lengths", arguments.lengths, int)
    draws = _numbers("draws", arguments.draws, int)
    if len(draws) == 1:
        draws *= len(lengths)
    if len(draws) != len(lengths) or min(draws) < 1 or len(set(lengths)) < len(lengths):
        raise UsageError(f"--draws={arguments.draws} must be a number of at least 1, or one for each of the "
                         f"different --lengths={arguments.lengths}")
    if min(lengths) <= ROOM:
        raise UsageError(f"--lengths={arguments.lengths}: {min(lengths)} tokens have no room for a context "
                         f"besides the {ROOM} of question and answer")
    return dict(zip(lengths, draws, strict=True))


def _tasks(names: str) -> list[str]:
    tasks = names.split(",")
    for task in tasks:
        try:
            check_choice("--tasks", task, TASKS)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return list(dict.fromkeys(tasks))


def _choices(arguments: argparse.Namespace) -> Choices:
    depths = tuple(_numbers("depths", arguments.depths, float))
    if min(depths) < 0 or max(depths) > 1 or len({round(1000 * depth) for depth in depths}) < len(depths):
        raise UsageError(f"--depths={arguments.depths} must be different numbers from 0 to 1")
    if not 1 <= arguments.pairs <= len(KEYS):
        raise UsageError(f"--pairs={arguments.pairs} must be from 1 to {len(KEYS)}, the number of keys")
    if not 0 <= arguments.seed < 2**32:
        raise UsageError(f"--seed={arguments.seed} must be from 0 to {2**32 - 1}")
    return Choices(arguments.seed, depths, arguments.pairs)


def _numbers(name: str, text: str, kind: type) -> list:
    try:
        return [kind(each) for each in text.split(",")]
    except ValueError:
        raise UsageError(f"--{name}={text} must be numbers, with commas between them") from None


def _settings(
    arguments: argparse.Namespace, saved: SavedRun, make: Maker, method: str
) -> Settings:
    choices = make.choices
    return Settings(
        method=method, question=arguments.question, seed=choices.seed, pairs=choices.num_pairs,
        room=ROOM, tokenizer=make.tokenizer.fingerprint, step=saved.step,
        model=saved.config.model, **make.prose.facts)
