"""The real model, for tests that are slow: the run that `make pretrained` makes."""
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from experiments.data.tokenizer import Tokenizer, open_tokenizer
from experiments.runs.saved_run import SavedRun
from experiments.weights.gguf_file import GGUFFile, open_gguf
from hnet import HNetConfig, HNetLM

RUN = Path(__file__).parents[2] / "runs" / "smollm2"


class PretrainedModel:
    """SmolLM2-135M-Instruct as a run.

    Attributes:
      workdir: the run's directory.
      config, model, params: the model, in float32.
    """

    def __init__(self, workdir: Path) -> None:
        with SavedRun.open(workdir) as saved:
            self.workdir: Path = saved.workdir
            self.config: HNetConfig = saved.config.model
            self.params: Any = saved.params()
            self._tokenizer = saved.config.data.tokenizer
        self.model = HNetLM(self.config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self._tokenizer, workdir=self.workdir)

    @cached_property
    def weights_path(self) -> Path:
        """The GGUF file that the run was made of; the test is skipped if it is gone."""
        path = Path(json.loads((self.workdir / "manifest.json").read_text())["imported_from"])
        if not path.is_file():
            pytest.skip(f"{path}, which {self.workdir} was made of, is gone; make pretrained")
        return path

    @cached_property
    def weights(self) -> GGUFFile:
        return open_gguf(self.weights_path)


@pytest.fixture(scope="session")
def smollm2() -> PretrainedModel:
    """The model in runs/smollm2 of this checkout, or in $HNET_SMOLLM2."""
    workdir = Path(os.environ.get("HNET_SMOLLM2") or RUN)
    if not (workdir / "checkpoints").is_dir():
        pytest.skip(f"{workdir if workdir != RUN else 'runs/smollm2'} is missing; make pretrained")
    return PretrainedModel(workdir)
