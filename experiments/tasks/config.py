"""What an experiment on a synthetic task is made of, with the defaults, and its form for the command line."""
import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.config.run import SCHEDULES, check_choice
from experiments.errors import UsageError
from hnet import StageConfig

KINDS = {
    "complexity": "one step of zeros after each symbol, no noise",
    "gaps": "gaps of random lengths, and noise on all inputs",
    "distractors": "as complexity, with symbols that the grammar forbids thrown in",
    "generalisation": "the model of gaps, tested with longer ones",
}
TARGETS = ("state", "next_symbol")
# A stack has no chunks, and its layers are those of a mixer.
_UNUSED_STAGE_FIELDS = (
    "encoder", "decoder", "router", "router_stride", "entropy_threshold", "downsampler", "upsampler", "capacity",
    "overflow", "grow_to", "packed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQARConfig:
    """Multi-query associative recall: sequences of several lengths and numbers of pairs; see tasks/mqar.py."""

    vocab_size: int = 8192                                        # half keys, half values
    train_lengths: tuple[int, ...] = (64, 128, 256, 256, 256)     # tokens, one entry per kind of batch
    train_pairs: tuple[int, ...] = (4, 8, 16, 32, 64)             # keys and values, of the same kinds
    train_shares: tuple[float, ...] = (5.0, 1.0, 1.0, 1.0, 1.0)   # of the steps, of the same kinds; any scale
    test_lengths: tuple[int, ...] = (64, 64, 64, 128, 256, 512, 1024)  # one entry per column of the table
    test_pairs: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    one_model: bool = True            # trained on all kinds; False: one per kind, each tested on its own kind
    power: float = 0.01               # a in p(gap) ~ gap^(a - 1): small = keys are asked for soon
    random_non_queries: bool = True   # slots that hold nothing get random tokens; False: token 0

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
    """State tracking in strings of random grammars, one per alphabet; see tasks/selectivbench.py."""

    kinds: tuple[str, ...] = tuple(KINDS)    # a model is trained per kind and alphabet, see KINDS
    alphabets: tuple[int, ...] = (20, 24, 26, 30, 34, 38, 40)  # ambiguous symbols
    depth: int = 0                           # states per ambiguous symbol; 0 = as many as there are symbols
    density: float = 0.4                     # of the symbols that may follow a state
    target: str = "state"                    # state = of the last symbol | next_symbol
    num_shown: int = 200                     # symbols of a sequence, which may begin several strings
    gaps: tuple[int, ...] = (1, 10)          # fewest and most steps after a symbol, in the kind "gaps"
    noise: float = 0.2                       # amplitude, in the kinds "gaps" and "generalisation"
    distractor_probability: float = 0.1      # of one after a symbol, in the kind "distractors"
    first_distractor: int = 50               # the first symbol that may be followed by one
    longer_gaps: tuple[int, ...] = (10, 20, 50, 100)  # steps after every symbol, in the tests of "generalisation"

    def __post_init__(self):
        check_choice("data.target", self.target, TARGETS)
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
    """One experiment: a task, and how every mixer is built, trained and tested on it."""

    data: DataConfig                       # MQARConfig or SelectivBenchConfig: the task
    stage: StageConfig                     # width, and the fields of the mixers; its encoder is ""
    mixers: tuple[str, ...]                # layouts; a name without a count has num_layers layers
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)  # peaks, each of which is tried with every mixer
    num_layers: int = 2
    conv_taps: int = 3                     # of a causal convolution before the layers; 0 = none
    dtype: str = "float32"                 # of activations and matmuls; parameters and states stay float32
    num_steps: int = 1000
    batch_size: int = 64                   # sequences, all new in every step
    steps_per_call: int = 20               # on the device without a word from the host; divides num_steps
    schedule: str = "cosine"               # of the learning rate, see experiments/config/run.py
    warmup_fraction: float = 0.1           # of num_steps
    final_lr_fraction: float = 0.0         # of the peak, at the last step
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0             # 0 = off
    test_sequences: int = 1000             # per column and split, in whole batches
    test_batch_size: int = 64              # sequences at a time in tests, which may be longer than in training

    def __post_init__(self):
        for field in ("num_layers", "num_steps", "batch_size", "steps_per_call", "test_sequences",
                      "test_batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} {getattr(self, field)} must be at least 1")
        if self.num_steps % self.steps_per_call:
            raise ValueError(f"num_steps {self.num_steps} is not a multiple of steps_per_call "
                             f"{self.steps_per_call}; change one of them")
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if not self.mixers or len(set(self.mixers)) < len(self.mixers):
            raise ValueError(f"mixers {self.mixers} must be one or more different layouts")
        rates = self.learning_rates
        if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
            raise ValueError(f"learning_rates {rates} must be one or more different numbers above 0")
        if self.conv_taps < 0:
            raise ValueError(f"conv_taps {self.conv_taps} must not be negative; 0 is no convolution")

    @property
    def task(self) -> str:
        return next(name for name, kind in TASKS.items() if isinstance(self.data, kind))

    def stage_of(self, mixer: str) -> StageConfig:
        """The stage whose layers are those of a mixer: "t" and "t2" are the same for num_layers 2."""
        layout = mixer if mixer[-1:].isdigit() else f"{mixer}{self.num_layers}"
        try:
            return dataclasses.replace(self.stage, encoder=layout)
        except ValueError as error:
            raise ValueError(f"mixer {mixer!r}: {error}") from error

    def to_config_dict(self) -> ConfigDict:
        """The form that the command line can reach into: --config.stage.num_heads=2."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        stage = dataclasses.asdict(self.stage)
        fields["stage"] = {name: value for name, value in stage.items() if name not in _UNUSED_STAGE_FIELDS}
        fields["data"] = dataclasses.asdict(self.data)
        return ConfigDict({"task": self.task, **fields})

    @classmethod
    def from_config_dict(cls, config: ConfigDict | Mapping[str, Any]) -> "TaskConfig":
        """The inverse of `to_config_dict`.

        Raises:
          UsageError: a value is out of range, a field does not exist, or a mixer does not fit the stage.
        """
        fields = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
        try:
            task = fields.pop("task")
            check_choice("task", task, TASKS)
            fields["data"] = TASKS[task](**fields["data"])
            fields["stage"] = StageConfig(**fields["stage"], encoder="", decoder="")
            task_config = cls(**fields)
            for mixer in task_config.mixers:
                task_config.stage_of(mixer)
            return task_config
        except KeyError as error:
            raise UsageError(f"config: it has no field {error}, so it is none of a task; those are in "
                             "configs/tasks") from error
        except (ValueError, TypeError) as error:
            raise UsageError(f"config: {error}") from error
