"""Sizes and settings of an experiment on a synthetic task: frozen dataclasses with the defaults."""
import dataclasses
from typing import Literal, get_args

from experiments.config.run import Schedule, check_choice
from hnet import StackConfig
from hnet.config import Dtype

KINDS = {
    "complexity": "one step of zeros after each symbol, no noise",
    "gaps": "gaps of random lengths, and noise on all inputs",
    "distractors": "as complexity, with symbols that the grammar forbids thrown in",
    "generalisation": "the model of gaps, tested with longer ones",
}
Target = Literal["state", "next_symbol"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQARConfig:
    """Multi-query associative recall: sequences of several lengths and numbers of pairs; see tasks/mqar.py.

    Attributes:
      vocab_size: half keys, half values.
      train_lengths: tokens, one entry per kind of batch.
      train_pairs: keys and values, of the same kinds.
      train_shares: fractions of the steps, of the same kinds; on any scale.
      test_lengths, test_pairs: one entry per column of the table.
      one_model: trained on all kinds; False: one model per kind, each tested on its own kind.
      power: a in p(gap) ~ gap^(a - 1): small = keys are asked for soon.
      random_non_queries: slots that hold nothing get random tokens; False: token 0.
    """

    vocab_size: int = 8192
    train_lengths: tuple[int, ...] = (64, 128, 256, 256, 256)
    train_pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    train_shares: tuple[float, ...] = (5.0, 1.0, 1.0, 1.0, 1.0)
    test_lengths: tuple[int, ...] = (64, 64, 64, 128, 256, 512, 1024)
    test_pairs: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    one_model: bool = True
    power: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self):
        if not len(self.train_lengths) == len(self.train_pairs) == len(self.train_shares) > 0:
            raise ValueError("data.train_lengths, data.train_pairs and data.train_shares must have one value per "
                             f"kind of batch; they have {len(self.train_lengths)}, {len(self.train_pairs)} and "
                             f"{len(self.train_shares)}")
        if not len(self.test_lengths) == len(self.test_pairs) > 0:
            raise ValueError("data.test_lengths and data.test_pairs must have one value per column; they have "
                             f"{len(self.test_lengths)} and {len(self.test_pairs)}")
        if min(self.train_shares) <= 0:
            raise ValueError(f"data.train_shares {self.train_shares} must all be above 0")
        same = (self.train_lengths, self.train_pairs) == (self.test_lengths, self.test_pairs)
        if not self.one_model and not same:
            raise ValueError("data.one_model False tests each model on what it was trained on: make "
                             "data.test_lengths and data.test_pairs equal to the training ones")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectivBenchConfig:
    """State tracking in strings of random grammars, one per alphabet; see tasks/selectivbench.py.

    Attributes:
      kinds: a model is trained per kind and alphabet, see KINDS.
      alphabets: ambiguous symbols.
      depth: states per ambiguous symbol; 0 = as many as there are symbols.
      density: fraction of the symbols that may follow a state.
      target: the "state" of the last symbol, or the "next_symbol".
      num_shown: symbols of a sequence, which may begin several strings.
      gaps: fewest and most steps after a symbol, in the kind "gaps".
      noise: amplitude, in the kinds "gaps" and "generalisation".
      distractor_probability: chance of one after a symbol, in the kind "distractors".
      first_distractor: the first symbol that may be followed by one.
      longer_gaps: steps after every symbol, in the tests of "generalisation".
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    alphabets: tuple[int, ...] = (20, 24, 26, 30, 34, 38, 40)
    depth: int = 0
    density: float = 0.4
    target: Target = "state"
    num_shown: int = 200
    gaps: tuple[int, ...] = (1, 10)
    noise: float = 0.2
    distractor_probability: float = 0.1
    first_distractor: int = 50
    longer_gaps: tuple[int, ...] = (10, 20, 50, 100)

    def __post_init__(self):
        check_choice("data.target", self.target, get_args(Target))
        for kind in self.kinds:
            check_choice("data.kinds", kind, KINDS)
        if not self.kinds or not self.alphabets or not self.longer_gaps:
            raise ValueError("data.kinds, data.alphabets and data.longer_gaps must not be empty")
        if len(self.gaps) != 2 or not 0 <= self.gaps[0] <= self.gaps[1]:
            raise ValueError(f"data.gaps {self.gaps} must be two numbers of steps, fewest and most")
        if min(self.longer_gaps) < 0 or self.noise < 0 or self.depth < 0 or self.first_distractor < 0:
            raise ValueError("data.longer_gaps, noise, depth and first_distractor must not be negative; they are "
                             f"{self.longer_gaps}, {self.noise}, {self.depth} and {self.first_distractor}")
        if not 0 <= self.distractor_probability <= 1:
            raise ValueError(f"data.distractor_probability {self.distractor_probability} must be from 0 to 1")
        if self.num_shown < 1:
            raise ValueError(f"data.num_shown {self.num_shown} must be at least 1")


DataConfig = MQARConfig | SelectivBenchConfig
TASKS: dict[str, type[DataConfig]] = {"mqar": MQARConfig, "selectivbench": SelectivBenchConfig}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One experiment: a task, and how every mixer is built, trained and tested on it.

    Attributes:
      data: the task, which is named in the field "task" of the JSON.
      stack: width, and the sizes of the mixers.
      mixers: layouts; a name without a count has num_layers layers.
      learning_rates: peaks, each of which is tried with every mixer.
      conv_taps: of a causal convolution before the layers; 0 = none.
      dtype: of activations and matmuls; parameters and states stay float32.
      batch_size: sequences, all new in every step.
      steps_per_call: steps on the device without a word from the host; divides num_steps.
      schedule: of the learning rate, see experiments/config/run.py.
      warmup_fraction: of num_steps.
      final_lr_fraction: of the peak, at the last step.
      max_grad_norm: gradients are scaled down to this global norm; 0 = off.
      test_sequences: per column and split, in whole batches.
      test_batch_size: sequences at a time in tests, which may be longer than in training.
    """

    data: DataConfig = dataclasses.field(metadata={"kinds": TASKS, "tag": "task"})
    stack: StackConfig
    mixers: tuple[str, ...]
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    num_layers: int = 2
    conv_taps: int = 3
    dtype: Dtype = "float32"
    num_steps: int = 1000
    batch_size: int = 64
    steps_per_call: int = 20
    schedule: Schedule = "cosine"
    warmup_fraction: float = 0.1
    final_lr_fraction: float = 0.0
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    test_sequences: int = 1000
    test_batch_size: int = 64

    def __post_init__(self):
        for field in ("num_layers", "num_steps", "batch_size", "steps_per_call", "test_sequences",
                      "test_batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} {getattr(self, field)} must be at least 1")
        if self.num_steps % self.steps_per_call:
            raise ValueError(f"num_steps {self.num_steps} is not a multiple of steps_per_call "
                             f"{self.steps_per_call}; change one of them")
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("dtype", self.dtype, get_args(Dtype))
        if not self.mixers or len(set(self.mixers)) < len(self.mixers):
            raise ValueError(f"mixers {self.mixers} must be one or more different layouts")
        rates = self.learning_rates
        if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
            raise ValueError(f"learning_rates {rates} must be one or more different numbers above 0")
        if self.conv_taps < 0:
            raise ValueError(f"conv_taps {self.conv_taps} must not be negative; 0 is no convolution")
        for mixer in self.mixers:
            try:
                self.stack.check_layouts(self.layout_of(mixer))
            except ValueError as error:
                raise ValueError(f"mixer {mixer!r}: {error}") from error

    @property
    def task(self) -> str:
        """The name in TASKS."""
        return next(name for name, kind in TASKS.items() if isinstance(self.data, kind))

    def layout_of(self, mixer: str) -> str:
        """Returns the layout of a mixer's layers: "t" and "t2" are the same for num_layers 2."""
        return mixer if mixer[-1:].isdigit() else f"{mixer}{self.num_layers}"
