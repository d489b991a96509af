"""Results of the runs of a task: one JSON file for each, written when the run is finished."""
import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.config.codec import flat_fields
from experiments.config.files import config_from_saved
from experiments.runs.grid import refuse_another_config
from experiments.tasks.config import TaskConfig
from experiments.tasks.training import Measured

SWEPT = ("mixers", "learning_rates")  # fields that say which runs there are, and nothing about any one of them


@dataclasses.dataclass(frozen=True)
class RunName:
    """The name of a run among those of an experiment."""

    mixer: str
    setting: str
    seed: int
    learning_rate: float

    def __str__(self) -> str:
        return f"{self.mixer} {self.setting} seed {self.seed} rate {self.learning_rate:g}"

    def path(self, outdir: Path) -> Path:
        return outdir / "runs" / f"{self.mixer}-{self.setting}-seed{self.seed}-rate{self.learning_rate:g}.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished run."""

    mixer: str
    setting: str
    seed: int
    learning_rate: float
    validation: dict[str, float]  # column -> share of right answers; all 0 for a run that diverged
    test: dict[str, float]
    curve: list[Measured]         # of training, by rising step
    diverged_at: int              # the step by which the loss was not finite, which ended the run; 0 = none
    num_params: int
    train_seconds: float          # of all calls but the first, which compiles
    commit: str                   # and what else tells where the numbers come from
    is_dirty: bool
    device: str
    versions: dict[str, str]
    config: dict[str, Any]

    @property
    def name(self) -> RunName:
        return RunName(self.mixer, self.setting, self.seed, self.learning_rate)

    @property
    def summary(self) -> str:
        if self.diverged_at:
            return f"diverged by step {self.diverged_at}"
        return ", ".join(f"{column} {100 * share:.1f} %" for column, share in self.test.items())


def load(name: RunName, outdir: Path, config: TaskConfig) -> Result | None:
    """Returns the result of a run, or None where it is not finished.

    Raises:
      UsageError: the run was made with another config.
    """
    path = name.path(outdir)
    if not path.is_file():
        return None
    fields = json.loads(path.read_text(encoding="utf-8"))
    # Through TaskConfig, which fills in fields that were added since.
    configs = config_from_saved(fields["config"], TaskConfig), config
    before, now = ({f"config.{name}": value for name, value in flat_fields(each).items() if name not in SWEPT}
                   for each in configs)
    refuse_another_config(path, before, now)
    return Result(**fields | {"curve": [Measured(*each) for each in fields["curve"]]})
