"""Settings that an experiment trains, and the columns that it tests them on."""
import dataclasses

from experiments.tasks.config import MQARConfig, SelectivBenchConfig, TaskConfig
from experiments.tasks.examples import Source
from experiments.tasks.mqar import MQAR
from experiments.tasks.selectivbench import SelectivBench, make_grammar

PANELS = {  # of the plot, for the kinds of SelectivBench
    "complexity": "no noise, by symbols of the alphabet",
    "gaps": "gaps and noise, by symbols of the alphabet",
    "distractors": "distractors, by symbols of the alphabet",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """A source that models are tested on; one column of the table."""

    name: str       # unique among the columns of an experiment
    panel: str      # of the plot, with columns that differ in x alone
    x: float
    source: Source


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model to be trained for every mixer, learning rate and seed."""

    name: str                     # part of a file's name
    sources: tuple[Source, ...]   # what it is trained on
    shares: tuple[float, ...]     # how often each of them is drawn from, on any scale
    columns: tuple[Column, ...]
    input_size: int               # tokens, or features of a step
    num_classes: int


def settings_of(config: TaskConfig, seed: int) -> list[Setting]:
    """Returns the settings of an experiment, which are the same for every seed but for the grammars.

    Raises:
      ValueError: a length does not hold its pairs, or there is no such grammar.
    """
    return _mqar(config.data) if isinstance(config.data, MQARConfig) else _selectivbench(config.data, seed)


def _mqar(data: MQARConfig) -> list[Setting]:
    def source(length: int, num_pairs: int) -> MQAR:
        return MQAR(data.vocab_size, length, num_pairs, data.power, data.random_non_queries)

    sources = tuple(map(source, data.train_lengths, data.train_pairs))
    columns = tuple(
        Column(f"{pairs} pairs in {length}", "recall, by pairs of key and value", pairs, source(length, pairs))
        for length, pairs in zip(data.test_lengths, data.test_pairs, strict=True))
    sizes = data.vocab_size, data.vocab_size
    if data.one_model:
        return [Setting("all", sources, data.train_shares, columns, *sizes)]
    return [Setting(f"{each.length}x{each.num_pairs}", (each,), (1.0,), (column,), *sizes)
            for each, column in zip(sources, columns, strict=True)]


def _selectivbench(data: SelectivBenchConfig, seed: int) -> list[Setting]:
    settings = []
    for alphabet in data.alphabets:
        grammar = make_grammar(seed, alphabet, data.depth or alphabet, data.density)
        plain = SelectivBench(grammar, data.num_shown, (1, 1), target=data.target)
        gaps = dataclasses.replace(plain, gaps=data.gaps, noise=data.noise)
        sources = {"complexity": plain, "gaps": gaps, "distractors": dataclasses.replace(
            plain, distractor_probability=data.distractor_probability, first_distractor=data.first_distractor)}
        longer = tuple(
            Column(f"gaps of {steps}, {alphabet} symbols", f"longer gaps, {alphabet} symbols, by their steps",
                   steps, dataclasses.replace(gaps, gaps=(steps, steps)))
            for steps in data.longer_gaps if "generalisation" in data.kinds)
        num_classes = grammar.num_states if data.target == "state" else grammar.num_symbols
        for kind, source in sources.items():
            columns = (Column(f"{kind}, {alphabet} symbols", PANELS[kind], alphabet, source),)
            columns = (columns if kind in data.kinds else ()) + (longer if kind == "gaps" else ())
            if columns:
                settings.append(Setting(
                    f"{kind}{alphabet}", (source,), (1.0,), columns, grammar.num_symbols, num_classes))
    return settings
