"""What a run is made of: frozen dataclasses with the defaults, and their ConfigDict form for the command line."""
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from ml_collections import ConfigDict

from experiments.errors import UsageError, suggest
from hnet import HNetConfig
from layers.chunking.ratio_loss import RatioObjective

SCHEDULES = {
    "wsd": "warm up, stay, fall as 1 - sqrt",
    "wsd_inverse_sqrt": "warm up, stay, fall as an inverse square root",
    "cosine": "warm up, fall as a cosine",
}
DECAY_GROUPS = ("kernels", "official")
STAGE_LR_RULES = ("equal", "paper")
RATIO_STATISTICS = ("global", "local")


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{field} {value!r} is not one of {', '.join(choices)}{suggest(value, choices)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where bytes come from, and in what portions."""

    source: str = "stdlib"      # stdlib | files:<glob> | tfds:<name or prepared directory>
    text_key: str = "text"      # the feature to read from a tfds data set
    cache_dir: str = ""         # prepared corpora; "" = the user's cache directory
    sequence_length: int = 256  # bytes per window
    batch_size: int = 16        # windows per step, over all devices and hosts
    loss_after: str = ""        # predict what follows this text in a document, such as "\\nAnswer:"; "" = all

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
    """AdamW with a schedule, per-stage learning rates and a choice of what decays."""

    peak_lr: float = 3e-3
    schedule: str = "wsd"             # see SCHEDULES
    warmup_steps: int = 20
    warmup_fraction: float = 0.0      # of num_steps, in place of warmup_steps, which is then 0
    decay_fraction: float = 0.2       # of num_steps, at the end; for wsd and wsd_inverse_sqrt
    final_lr_fraction: float = 0.05   # of peak_lr, reached at the last step
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    decay_groups: str = "kernels"     # kernels = matrices and convolution taps | official = all the release decays
    max_grad_norm: float = 1.0        # gradients are scaled down to this global norm; 0 = off
    accumulation_steps: int = 1       # parts of a batch that are differentiated one after the other
    stage_lr_rule: str = "equal"      # equal = one rate | paper = by width and compression, H-Net eq. 11
    stage_lr_multipliers: tuple[float, ...] = ()  # outermost stage first, in place of a rule; () = by the rule
    ema_decay: float = 0.0            # per step, of an average of the weights that evaluation uses; 0 = none

    def __post_init__(self):
        for field, choices in (("schedule", SCHEDULES), ("decay_groups", DECAY_GROUPS),
                               ("stage_lr_rule", STAGE_LR_RULES)):
            check_choice(f"optimizer.{field}", getattr(self, field), choices)
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
    """One experiment: a model, its data, its optimisation, and how often to look."""

    model: HNetConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = 0
    num_steps: int = 1000
    tokens_per_chunk: tuple[float, ...] = (4.0,)  # what the ratio loss aims at, one per chunking stage
    tokens_per_chunk_start: tuple[float, ...] = ()  # what it aims at in the first step; () = the same
    tokens_per_chunk_ramp_steps: int = 0            # from there to tokens_per_chunk, in equal parts
    ratio_objective: str = "hnet"    # hnet | hinge = only too many chunks cost | none; see layers.ratio_loss
    ratio_statistics: str = "global"  # means over: global = the batch | local = the rows of each data shard
    ratio_loss_weight: float = 0.03
    max_overflow_fraction: float = 1.0  # more of a stage's boundaries past its capacity stop training; 1 = never
    init_from: str = ""              # a run whose weights a new run starts from; "" = random weights
    boundary_lm_from: str = ""       # the run whose weights model.boundary_lm has
    log_every: int = 20              # steps
    eval_every: int = 200            # steps; also after the last one
    eval_bytes: int = 65_536         # held-out bytes per evaluation
    checkpoint_every: int = 200      # steps; also after the last one
    keep_checkpoints: int = 3
    model_axis: int = 1              # devices that share one copy of the parameters; the rest split the batch
    report: bool = True              # write report.html when training ends

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
            raise ValueError(f"data.sequence_length {self.data.sequence_length} must be at least 2 bytes")
        if not 0 <= self.max_overflow_fraction <= 1:
            raise ValueError(f"max_overflow_fraction {self.max_overflow_fraction} must be from 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} must be from 0 to 2**32 - 1")
        if self.data.batch_size % self.optimizer.accumulation_steps:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} is not a multiple of optimizer.accumulation_steps "
                f"{self.optimizer.accumulation_steps}; change one of them")
        if self.model.vocab_size < 256:
            raise ValueError(f"model.vocab_size {self.model.vocab_size} cannot hold all 256 bytes; set it to 256")

    def _check_ratio(self) -> None:
        check_choice("ratio_objective", self.ratio_objective, get_args(RatioObjective))
        check_choice("ratio_statistics", self.ratio_statistics, RATIO_STATISTICS)
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

    def to_config_dict(self) -> ConfigDict:
        """The form that the command line can reach into: --config.model.stages.stage1.width=128."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {
            "model": self.model.to_dict(),
            "data": dataclasses.asdict(self.data),
            "optimizer": dataclasses.asdict(self.optimizer),
        }
        return ConfigDict(fields)

    @classmethod
    def from_config_dict(cls, config: ConfigDict | Mapping[str, Any]) -> "RunConfig":
        """The inverse of `to_config_dict`.

        Raises:
          UsageError: a value is out of range, or a field does not exist.
        """
        fields = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
        try:
            fields["model"] = HNetConfig.from_dict(fields["model"])
            fields["data"] = DataConfig(**fields["data"])
            fields["optimizer"] = OptimizerConfig(**fields["optimizer"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"config: {error}") from error


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config
