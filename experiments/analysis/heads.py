"""Scores attention heads by what they copy: induction heads, previous-token heads, retrieval heads.

  python -m experiments.analysis heads --workdir=runs/smollm2 [--top=20] [--draws=4] [--length=1024] [--outdir=DIR]

  induction  128 random tokens, twice in a row: the mean attention from a token of the second copy to the token
             after its first occurrence
  previous   in the same texts, the mean attention from a token to the one before it
  retrieval  after arXiv 2404.15574, with the answer read along in place of generated: in texts of LENGTH tokens
             with one fact at five depths (the needle of experiments.tasks longcontext), the share of the answer's
             tokens whose predecessor attends to no token more than to one of the fact which is that same token
  needle     in those texts, the mean attention from these predecessors to the fact

Means over DRAWS texts of each kind. Stages within others attend from chunk to chunk: a token counts as the chunk
it is in, and for `induction` only tokens that begin one count. DIR/heads.json gets all heads; layers and heads are
counted from 0.
"""
import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence

import numpy as np

from experiments import commands
from experiments.analysis.attention_rows import RunOfHeads, read_heads
from experiments.config.command_line import split_overrides
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UsageError
from experiments.files import write_whole
from experiments.pages.tables import aligned
from experiments.runs.manifest import git_state, prepare_workdir
from experiments.runs.saved_run import SavedRun
from experiments.tasks.longcontext.examples import Example
from experiments.tasks.longcontext.generators import Choices, Maker, needle
from experiments.tasks.longcontext.prose import TOPICS, Prose
from experiments.tasks.longcontext.run_checks import check_context

PERIOD = 128  # random tokens
LISTED = 6    # heads of the shorter lists
Read = Callable[[np.ndarray], tuple[list[RunOfHeads], np.ndarray]]  # see `read_heads`


@dataclasses.dataclass(frozen=True)
class Head:
    """Scores of one head; see the module docstring."""

    stage: str
    part: str       # "encoder" or "decoder"
    run: int        # of the layout of that part
    layer: int      # of that layout
    run_layer: int  # of that run
    head: int
    key_head: int   # whose keys and values it reads
    induction: float
    previous: float
    retrieval: float
    needle: float


def main(argv: list[str]) -> None:
    parser = _parser()
    arguments = parser.parse_args(split_overrides(argv)[0])
    for name, least in (("top", 1), ("draws", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise UsageError(f"--{name}={getattr(arguments, name)} must be at least {least}")
    with SavedRun.from_command_line(parser, argv) as saved:
        model, tokenizer = saved.config.model, saved.tokenizer()
        repeats = [repeated_tokens(tokenizer, arguments.seed, draw) for draw in range(arguments.draws)]
        prose = Prose.of_source(TOPICS, tokenizer, seed=arguments.seed, held_out=False)
        maker = Maker(prose, tokenizer, Choices(arguments.seed))
        facts = [example for draw in range(arguments.draws)
                 for _, [example] in needle(maker, arguments.length, draw)]
        check_context(saved, max(arguments.length, len(repeats[0])), "--length")
        params = saved.params()
        heads, nats = score_heads(lambda tokens: read_heads(model, params, tokens), repeats, facts)
    outdir = prepare_workdir(arguments.outdir or saved.workdir)
    record = {
        "step": saved.step, "period": PERIOD, "draws": arguments.draws, "length": arguments.length,
        "seed": arguments.seed, "tokenizer": tokenizer.fingerprint, "text": prose.facts,
        "nats": {"first_copy": nats[0], "second_copy": nats[1]}, "commit": git_state()["commit"],
        "heads": [dataclasses.asdict(head) for head in heads]}
    write_whole(outdir / "heads.json", json.dumps(record, indent=1) + "\n")
    print(f"{report(heads, nats, arguments.top)}\n{outdir / 'heads.json'}")


def score_heads(
    read: Read, repeats: Sequence[np.ndarray], facts: Sequence[Example]
) -> tuple[list[Head], tuple[float, float]]:
    """Scores all heads of a model; returns them, and the nats per token of first and second copies.

    Args:
      repeats: from `repeated_tokens`.
      facts: examples with one fact in the context.
    Raises:
      UsageError: the model has no attention that can be looked at.
    """
    copying, nats, finding = [], [], []
    for tokens in repeats:
        runs, each = read(tokens)
        if not runs:
            raise UsageError("this model has no attention whose heads could be scored (t or T in a layout of "
                             "config.model.stages); use a run that has")
        second = len(tokens) - PERIOD
        copying.append([np.stack([induction(run, second), previous(run)]) for run in runs])
        nats.append((each[second - PERIOD : second - 1].mean(), each[second:].mean()))
    for example in facts:
        tokens = np.concatenate([example.context, example.question, example.answer])
        finding.append([np.stack(retrieval(run, tokens, example)) for run in read(tokens)[0]])
    heads = []
    for index, run in enumerate(runs):
        scores = np.concatenate([np.mean([each[index] for each in texts], axis=0) for texts in (copying, finding)])
        heads += _heads_of(run, scores)
    first, second = np.mean(nats, axis=0)
    return heads, (float(first), float(second))


def repeated_tokens(tokenizer: Tokenizer, seed: int, draw: int) -> np.ndarray:
    """Returns PERIOD different tokens drawn from all, twice in a row, after the token ahead of every document."""
    ids = np.setdiff1d(np.arange(tokenizer.vocab_size), [each for each in (tokenizer.bos, tokenizer.eos)
                                                         if each is not None])
    drawn = np.random.RandomState([seed, draw]).permutation(ids)[:PERIOD]
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    return np.concatenate([start, drawn, drawn]).astype(np.int32)


def induction(run: RunOfHeads, second: int) -> np.ndarray:
    """Returns the mean attention [l, h] from the second copy to what followed the first occurrence.

    Args:
      second: the token that begins the second copy; there are PERIOD in either.
    """
    tokens = np.arange(second, second + PERIOD)
    tokens = tokens[run.slots[tokens] > run.slots[tokens - 1]]  # those that begin a chunk, or all
    rows, wanted = run.slots[tokens], run.slots[tokens - PERIOD] + 1
    is_before = wanted < rows
    return _mean_attention(run, rows[is_before], wanted[is_before])


def previous(run: RunOfHeads) -> np.ndarray:
    """Returns the mean attention [l, h] from a row to the one before it."""
    rows = np.arange(1, run.slots[-1] + 1)
    return _mean_attention(run, rows, rows - 1)


def retrieval(run: RunOfHeads, tokens: np.ndarray, example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Returns the share of the answer's tokens that a head copies, and its attention to the fact, both [l, h]."""
    predicting = len(tokens) - len(example.answer) - 1 + np.arange(len(example.answer))
    fact = np.arange(*example.origin)
    rows = run.slots[predicting]
    is_fact = np.isin(np.arange(run.keys.shape[1]), run.slots[fact])
    mass, top = run.attention(rows, np.broadcast_to(is_fact, (len(rows), len(is_fact))))
    return is_copied(top, run.slots[fact], tokens[fact], example.answer).mean(axis=-1), mass.mean(axis=-1)


def is_copied(top: np.ndarray, fact_rows: np.ndarray, fact: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Tells whether the row that gets most attention is one of the fact, of the very token that comes next.

    Args:
      top: [..., r] the row with most attention of each token of the answer [r].
      fact_rows: [f] rows of the tokens of the fact [f].
    """
    return np.any((top[..., None] == fact_rows) & (answer[:, None] == fact), axis=-1)


def report(heads: Sequence[Head], nats: tuple[float, float], top: int) -> str:
    """Returns the heads with the highest induction scores, and the first few by the other scores."""
    ranked = sorted(heads, key=lambda head: -head.induction)
    header = ("stage", "layout", "layer", "head", "induction", "previous", "retrieval", "needle")
    rows = [(head.stage, head.part, str(head.layer), str(head.head), *(f"{getattr(head, name):.2f}"
             for name in header[4:])) for head in ranked[:top]]
    total, tenth = sum(head.induction for head in heads), math.ceil(len(heads) / 10)
    share = sum(head.induction for head in ranked[:tenth]) / total if total else 0.0
    lines = [
        f"random tokens, nats per token: {nats[0]:.2f} in the first copy, {nats[1]:.2f} in the second",
        *aligned([header, *rows], left=(0, 1)),
        f"induction: {sum(head.induction > 0.5 for head in heads)} of {len(heads)} heads above 0.5, "
        f"{sum(head.induction > 0.1 for head in heads)} above 0.1; the first {tenth} hold {100 * share:.0f} %"]
    for name in header[5:]:
        best = sorted(heads, key=lambda head: -getattr(head, name))[:LISTED]
        lines.append(f"{name}: " + " ".join(
            f"({head.stage} {head.part} {head.layer},{head.head} {getattr(head, name):.2f})" for head in best))
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = commands.run_parser(__doc__, "analysis heads", purpose="to analyse")
    parser.add_argument("--top", type=int, default=20, help="heads to print")
    parser.add_argument("--draws", type=int, default=4, help="texts of each kind")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the texts with a fact")
    parser.add_argument("--seed", type=int, default=0, help="of all texts")
    parser.add_argument("--outdir", help="where heads.json is written; the workdir by default")
    return parser


def _mean_attention(run: RunOfHeads, rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the mean over rows [r] of the attention to one wanted row each, [l, h]; 0 without rows."""
    if not len(rows):
        return np.zeros((run.queries.shape[0], run.queries.shape[2]))
    return run.attention(rows, wanted[:, None] == np.arange(run.keys.shape[1]))[0].mean(axis=-1)


def _heads_of(run: RunOfHeads, scores: np.ndarray) -> list[Head]:
    """Names the heads of a run, with their scores [4, l, h]."""
    _, num_layers, num_heads = scores.shape
    per_key_head = num_heads // run.keys.shape[2]
    return [Head(run.stage, run.part, run.run, run.first_layer + layer, layer, head, head // per_key_head,
                 *map(float, scores[:, layer, head]))
            for layer in range(num_layers) for head in range(num_heads)]
