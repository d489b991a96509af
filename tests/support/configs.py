"""A config with every kind of field that the codec knows."""
import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    width: int
    window: int | None = None

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width {self.width} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    stages: tuple[StageConfig, ...] = ()
    ratios: tuple[int, ...] = ()
    names: tuple[int | str, ...] = ()
    inner: "ModelConfig | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    peak_lr: float = 1e-2
    warmup_steps: int = 0
    betas: tuple[float, ...] = ()
    rule: Literal["equal", "paper"] = "equal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle:
    radius: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
    side: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Red:
    hue: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Green:
    hue: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0
    dtype: str = "bfloat16"
    is_tied: bool = True
    low: int = 0
    high: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    model: ModelConfig = ModelConfig()
    data: Circle | Square = dataclasses.field(
        default=Circle(), metadata={"kinds": {"circle": Circle, "square": Square}, "tag": "shape"})
    extras: tuple[Any, ...] = dataclasses.field(default=(), metadata={"kinds": {"red": Red, "green": Green}})

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
