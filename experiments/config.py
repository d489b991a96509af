"""What a run is made of: frozen dataclasses with the defaults, and their ConfigDict form for the command line."""
import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.errors import UsageError, suggest
from hnet import HNetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where bytes come from, and in what portions."""

    source: str = "stdlib"      # stdlib | files:<glob> | tfds:<name or prepared directory>
    text_key: str = "text"      # the feature to read from a tfds data set
    cache_dir: str = ""         # prepared corpora; "" = the user's cache directory
    sequence_length: int = 256  # bytes per window
    batch_size: int = 16        # windows per step, over all devices and hosts


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a schedule, per-stage learning rates and a choice of what decays."""

    peak_lr: float = 3e-3
    schedule: str = "wsd"             # wsd = warm up, stay, decay as 1 - sqrt | cosine
    warmup_steps: int = 20
    decay_fraction: float = 0.2       # of num_steps, at the end; for wsd
    final_lr_fraction: float = 0.05   # of peak_lr, reached at the last step
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    decay_groups: str = "kernels"     # kernels = matrices and convolution taps | official = all the release decays
    max_grad_norm: float = 1.0        # gradients are scaled down to this global norm; 0 = off
    accumulation_steps: int = 1       # parts of a batch that are differentiated one after the other
    stage_lr_multipliers: tuple[float, ...] = ()  # outermost stage first; () = 1 everywhere

    def __post_init__(self):
        for field, choices in (("schedule", ("wsd", "cosine")), ("decay_groups", ("kernels", "official"))):
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"optimizer.{field} {value!r} is not one of {', '.join(choices)}"
                                 f"{suggest(value, choices)}")
        for field in ("decay_fraction", "final_lr_fraction", "b1", "b2"):
            value = getattr(self, field)
            if not 0 <= value <= 1:
                raise ValueError(f"optimizer.{field} {value} must be from 0 to 1")
        for field in ("peak_lr", "warmup_steps", "weight_decay", "max_grad_norm"):
            value = getattr(self, field)
            if value < 0:
                raise ValueError(f"optimizer.{field} {value} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One experiment: a model, its data, its optimisation, and how often to look."""

    model: HNetConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = 0
    num_steps: int = 1000
    tokens_per_chunk: tuple[float, ...] = (4.0,)  # the ratio loss's target, one per chunking stage
    ratio_loss_weight: float = 0.03
    log_every: int = 20              # steps
    eval_every: int = 200            # steps; also after the last one
    eval_bytes: int = 65_536         # held-out bytes per evaluation
    checkpoint_every: int = 200      # steps; also after the last one
    keep_checkpoints: int = 3
    model_axis: int = 1              # devices that share one copy of the parameters; the rest split the batch
    report: bool = True              # write report.html when training ends

    def __post_init__(self):
        num_chunking = len(self.model.stages) - 1
        for field, values in (
            ("tokens_per_chunk", self.tokens_per_chunk),
            ("optimizer.stage_lr_multipliers", self.optimizer.stage_lr_multipliers),
        ):
            wanted = num_chunking if field == "tokens_per_chunk" else num_chunking + 1
            if len(values) != wanted and not (field != "tokens_per_chunk" and not values):
                raise ValueError(f"{field} {values} must have one value per stage that it speaks of: {wanted}")
        if any(target <= 1 for target in self.tokens_per_chunk):
            raise ValueError(f"tokens_per_chunk {self.tokens_per_chunk} must all be above 1")
        positive = ("num_steps", "log_every", "eval_every", "eval_bytes", "checkpoint_every", "keep_checkpoints",
                    "model_axis", "data.batch_size", "optimizer.accumulation_steps")
        for field in positive:
            value = _get(self, field)
            if value < 1:
                raise ValueError(f"{field} {value} must be at least 1")
        if self.data.sequence_length < 2:
            raise ValueError(f"data.sequence_length {self.data.sequence_length} must be at least 2 bytes")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} must be from 0 to 2**32 - 1")
        if self.data.batch_size % self.optimizer.accumulation_steps:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} is not a multiple of optimizer.accumulation_steps "
                f"{self.optimizer.accumulation_steps}; change one of them")
        if self.model.vocab_size < 256:
            raise ValueError(f"model.vocab_size {self.model.vocab_size} cannot hold all 256 bytes; set it to 256")

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
