"""Settings of a training run: frozen dataclasses with the defaults, checked where they are made."""
import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args

from experiments.errors import suggest
from hnet import HNetConfig
from layers.chunking.ratio_loss import RatioObjective

SCHEDULES = {
    "wsd": "warm up, stay, fall as 1 - sqrt",
    "wsd_inverse_sqrt": "warm up, stay, fall as an inverse square root",
    "cosine": "warm up, fall as a cosine",
}
Schedule = Literal["wsd", "wsd_inverse_sqrt", "cosine"]
DecayGroups = Literal["kernels", "official"]
StageLrRule = Literal["equal", "paper"]
RatioStatistics = Literal["global", "local"]


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError for a value that is not one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{field} {value!r} is not one of {', '.join(choices)}{suggest(value, choices)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    r"""Source of the text, its tokens, and the portions in which they are read.

    Attributes:
      source: stdlib | files:<glob> | tfds:<name or prepared directory>.
      text_key: the feature to read from a tfds data set.
      cache_dir: prepared corpora; "" = the user's cache directory.
      tokenizer: a tokenizer.json, looked for in the workdir first; "" = the bytes themselves.
      sequence_length: tokens per window, which are bytes without a tokenizer.
      batch_size: windows per step, over all devices and hosts.
      loss_after: only what follows this text in a document is predicted, such as "\nAnswer:"; "" = all.
    """

    source: str = "stdlib"
    text_key: str = "text"
    cache_dir: str = ""
    tokenizer: str = ""
    sequence_length: int = 256
    batch_size: int = 16
    loss_after: str = ""

    def __post_init__(self):
        try:
            self.loss_marker  # noqa: B018
        except UnicodeError as error:
            raise ValueError(f"data.loss_after {self.loss_after!r} is no text: {error}; "
                             "a backslash that stands for itself is written twice") from None

    @property
    def loss_marker(self) -> bytes:
        r"""`loss_after` in UTF-8; \n, \t, \\ and so on in it mean what they mean in Python."""
        # unicode_escape reads Latin-1: what is not, is escaped first.
        text = self.loss_after.encode("latin-1", "backslashreplace").decode("unicode_escape")
        return text.encode("utf-8", "surrogateescape")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a schedule, a learning rate per stage, and a choice of what decays.

    Attributes:
      peak_lr: learning rate after the warm-up.
      schedule: see SCHEDULES.
      warmup_steps: steps of linear rise.
      warmup_fraction: the same as a fraction of num_steps, in place of warmup_steps, which is then 0.
      decay_fraction: of num_steps, at the end; for wsd and wsd_inverse_sqrt.
      final_lr_fraction: of peak_lr, reached at the last step.
      b1, b2: decay per step of Adam's averages of gradients and of their squares.
      weight_decay: per step and learning rate.
      decay_groups: "kernels" = matrices and convolution taps; "official" = all that the release decays.
      max_grad_norm: gradients are scaled down to this global norm; 0 = off.
      accumulation_steps: parts of a batch that are differentiated one after the other.
      stage_lr_rule: "equal" = one rate; "paper" = by width and compression, H-Net eq. 11.
      stage_lr_multipliers: one per stage, outermost first, in place of a rule; () = by the rule.
      ema_decay: per step, of an average of the weights that evaluation uses; 0 = none.
    """

    peak_lr: float = 3e-3
    schedule: Schedule = "wsd"
    warmup_steps: int = 20
    warmup_fraction: float = 0.0
    decay_fraction: float = 0.2
    final_lr_fraction: float = 0.05
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    decay_groups: DecayGroups = "kernels"
    max_grad_norm: float = 1.0
    accumulation_steps: int = 1
    stage_lr_rule: StageLrRule = "equal"
    stage_lr_multipliers: tuple[float, ...] = ()
    ema_decay: float = 0.0

    def __post_init__(self):
        for field, choices in (("schedule", Schedule), ("decay_groups", DecayGroups),
                               ("stage_lr_rule", StageLrRule)):
            check_choice(f"optimizer.{field}", getattr(self, field), get_args(choices))
        for field in ("warmup_fraction", "decay_fraction", "final_lr_fraction", "b1", "b2"):
            value = getattr(self, field)
            if not 0 <= value <= 1:
                raise ValueError(f"optimizer.{field} {value} must be from 0 to 1")
        for field in ("peak_lr", "warmup_steps", "weight_decay", "max_grad_norm"):
            value = getattr(self, field)
            if value < 0:
                raise ValueError(f"optimizer.{field} {value} must not be negative")
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError(
                f"optimizer.warmup_steps {self.warmup_steps} and optimizer.warmup_fraction {self.warmup_fraction} "
                "both say how long to warm up; set one of them to 0")
        if self.schedule == "wsd_inverse_sqrt" and self.final_lr_fraction == 0:
            raise ValueError("optimizer.final_lr_fraction 0 is never reached by an inverse square root; "
                             "set it above 0, or optimizer.schedule to 'wsd' or 'cosine'")
        if self.stage_lr_rule != "equal" and self.stage_lr_multipliers:
            raise ValueError(
                f"optimizer.stage_lr_rule {self.stage_lr_rule!r} and optimizer.stage_lr_multipliers "
                f"{self.stage_lr_multipliers} both say how fast a stage learns; leave one at its default")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"optimizer.ema_decay {self.ema_decay} must be from 0 to below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One experiment: a model, its data, its optimisation, and how often to look.

    Attributes:
      seed: of the initial weights and of the order of the data.
      num_steps: steps of training in all.
      tokens_per_chunk: compression that the ratio loss aims at, one per chunking stage.
      tokens_per_chunk_start: the same in the first step; () = no schedule.
      tokens_per_chunk_ramp_steps: steps from there to tokens_per_chunk, in equal parts.
      ratio_objective: "hnet"; "hinge" = only too many chunks cost; "none"; see `layers.ratio_loss`.
      ratio_statistics: means over the "global" batch, or the "local" rows of each data shard.
      ratio_loss_weight: factor on the ratio losses.
      max_overflow_fraction: more of a stage's boundaries past its capacity stop training; 1 = never.
      init_from: a run whose weights a new run starts from; "" = random weights.
      boundary_lm_from: the run whose weights model.boundary_lm has.
      log_every, eval_every, checkpoint_every: steps between; the last two also after the last step.
      eval_bytes: held-out bytes per evaluation.
      keep_checkpoints: newest checkpoints that stay on disk.
      model_axis: devices that share one copy of the parameters; the others split the batch.
      report: write report.html when training ends.
    """

    model: HNetConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = 0
    num_steps: int = 1000
    tokens_per_chunk: tuple[float, ...] = (4.0,)
    tokens_per_chunk_start: tuple[float, ...] = ()
    tokens_per_chunk_ramp_steps: int = 0
    ratio_objective: RatioObjective = "hnet"
    ratio_statistics: RatioStatistics = "global"
    ratio_loss_weight: float = 0.03
    max_overflow_fraction: float = 1.0
    init_from: str = ""
    boundary_lm_from: str = ""
    log_every: int = 20
    eval_every: int = 200
    eval_bytes: int = 65_536
    checkpoint_every: int = 200
    keep_checkpoints: int = 3
    model_axis: int = 1
    report: bool = True

    def __post_init__(self):
        self._check_ratio()
        num_stages = len(self.model.stages)
        multipliers = self.optimizer.stage_lr_multipliers
        if multipliers and len(multipliers) != num_stages:
            raise ValueError(f"optimizer.stage_lr_multipliers {multipliers} must have one value per stage: "
                             f"{num_stages}")
        positive = ("num_steps", "log_every", "eval_every", "eval_bytes", "checkpoint_every", "keep_checkpoints",
                    "model_axis", "data.batch_size", "optimizer.accumulation_steps")
        for field in positive:
            value = _get(self, field)
            if value < 1:
                raise ValueError(f"{field} {value} must be at least 1")
        if self.data.sequence_length < 2:
            raise ValueError(f"data.sequence_length {self.data.sequence_length} must be at least 2 "
                             f"{'tokens' if self.data.tokenizer else 'bytes'}")
        if not 0 <= self.max_overflow_fraction <= 1:
            raise ValueError(f"max_overflow_fraction {self.max_overflow_fraction} must be from 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} must be from 0 to 2**32 - 1")
        if self.data.batch_size % self.optimizer.accumulation_steps:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} is not a multiple of optimizer.accumulation_steps "
                f"{self.optimizer.accumulation_steps}; change one of them")
        if self.model.vocab_size < 256 and not self.data.tokenizer:
            raise ValueError(f"model.vocab_size {self.model.vocab_size} cannot hold all 256 bytes; set it to 256")

    def _check_ratio(self) -> None:
        check_choice("ratio_objective", self.ratio_objective, get_args(RatioObjective))
        check_choice("ratio_statistics", self.ratio_statistics, get_args(RatioStatistics))
        num_chunking = len(self.model.stages) - 1
        start = self.tokens_per_chunk_start
        for field, values in (("tokens_per_chunk", self.tokens_per_chunk), ("tokens_per_chunk_start", start)):
            if len(values) != num_chunking and not (field == "tokens_per_chunk_start" and not values):
                raise ValueError(f"{field} {values} must have one value per stage that chunks: {num_chunking}")
            if any(target < 1 for target in values):
                raise ValueError(f"{field} {values} must not be below 1")
            if 1 in values and self.ratio_objective != "none":
                raise ValueError(f"{field} {values} must all be above 1, except for ratio_objective 'none'")
        if bool(start) != (self.tokens_per_chunk_ramp_steps > 0):
            raise ValueError(
                f"tokens_per_chunk_start {start} and tokens_per_chunk_ramp_steps "
                f"{self.tokens_per_chunk_ramp_steps} make a schedule together; set both or neither")


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config
