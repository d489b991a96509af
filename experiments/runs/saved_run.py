"""The one way into a run on disk, and the state that training begins with: from there, or a new one."""
import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from experiments.config import RunConfig
from experiments.config.codec import flat_fields
from experiments.config.command_line import apply_overrides, split_overrides
from experiments.config.files import config_from_saved
from experiments.data import ByteTokenizer, Corpus, Tokenizer
from experiments.data.token_corpus import TokenCorpus
from experiments.errors import UsageError
from experiments.runs.checkpoints import Checkpoints, MisfitError
from experiments.runs.compilation_cache import enable_compilation_cache
from experiments.training.batches import open_corpus, open_run_tokenizer
from experiments.training.mesh import make_mesh, replicated
from experiments.training.step import Program, TrainState
from hnet import parameter_shapes

PARAMETERS_ONLY = "parameters"  # meta["contents"] of a checkpoint without an optimizer's state
logger = logging.getLogger(__name__)


class SavedRun:
    """A run on disk, open at one of its checkpoints.

      with SavedRun.open("runs/quickstart") as saved:
          logits = HNetLM(saved.config.model).apply({"params": saved.params()}, tokens).logits

    Attributes:
      workdir: the absolute path of its directory.
      config: its config as it was saved, with the overrides of whoever opened it.
      meta: what was saved besides the arrays.
      step: the checkpoint that was read; a newest one whose arrays prove damaged is replaced by the one before.
    """

    def __init__(self, checkpoints: Checkpoints, step: int | None = None, overrides: Sequence[str] = ()) -> None:
        """Reads the record of `step`, or of the newest sound checkpoint; raises UsageError as `open` does."""
        record = checkpoints.read_record(step)
        self.workdir, self.meta, self.step = checkpoints.directory.parent, record.meta, record.step
        self.config = apply_overrides(config_from_saved(record.meta["config"], RunConfig), overrides)
        self._checkpoints, self._arrays, self._asked = checkpoints, record.arrays, step

    @classmethod
    def open(
        cls, workdir: str | Path, step: int | None = None, overrides: Sequence[str] = (), *,
        field: str = "--workdir",
    ) -> Self:
        """Opens checkpoint `step` of a run, or its newest sound one.

        Args:
          overrides: changes of its config, "--config.FIELD=VALUE".
          field: names the run in messages.
        Raises:
          UsageError: there is no such run or checkpoint, or an override does not fit its config.
        """
        workdir = Path(workdir).expanduser().absolute()
        if not (workdir / "checkpoints").is_dir():
            raise UsageError(f"{field}={workdir}: no run has saved a checkpoint there; "
                             f"train one with python -m experiments.train --config=quickstart --workdir={workdir}")
        return cls(Checkpoints(workdir / "checkpoints", keep=1), step, overrides)

    @classmethod
    def from_command_line(cls, parser: argparse.ArgumentParser, argv: list[str]) -> Self:
        """Parses --workdir, --step and --config.FIELD=VALUE, and opens that checkpoint."""
        enable_compilation_cache()
        arguments, overrides = split_overrides(argv)
        arguments = parser.parse_args(arguments)
        return cls.open(arguments.workdir, arguments.step, overrides)

    def params(self, wanted: Any = None) -> Any:
        """Reads the weights alone: their average over steps, where the run keeps one.

        Args:
          wanted: ShapeDtypeStructs with shardings for another model that has them; None reads those of
            `config.model` onto one device.
        Raises:
          UsageError: the checkpoint has other parameters.
        """
        part = "ema" if any(path.startswith("ema/") for path in self._arrays) else "params"
        if wanted is None:
            return self.restore(_on_one_device(parameter_shapes(self.config.model)), part=part)
        try:
            return self.restore(wanted, part=part)
        except MisfitError as error:
            raise UsageError(f"the model of {self.workdir} does not fit this one: "
                             f"{error.difference.removeprefix(f'{part}/')}; "
                             "change config.model, or start from another run") from error

    def restore(self, abstract: Any, *, part: str = "") -> Any:
        """Restores the state that `abstract` describes, or the entry `part` of it; see Checkpoints."""
        if self._asked is None:
            restored = self._checkpoints.restore_latest(abstract, part=part)
        else:
            restored = self._checkpoints.restore_step(self._asked, abstract, part=part)
        assert restored is not None, "its record was read"
        self.step, self.meta = restored.step, restored.meta
        return restored.state

    def corpus(self) -> Corpus:
        """Opens the text of the run, as bytes."""
        return open_corpus(self.config.data)

    def tokenizer(self) -> Tokenizer:
        """Opens the tokenizer of the run; raises UsageError if it is missing or has more ids than the model."""
        return open_run_tokenizer(self.config, self.workdir)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpoints.close()


def start_or_resume(
    config: RunConfig, program: Program, checkpoints: Checkpoints, corpus: Corpus | TokenCorpus
) -> tuple[TrainState, float]:
    """Returns the state to continue from, and the seconds that its steps have taken.

    Raises:
      UsageError: the run is another one than `config` describes, or weights to start from are missing or unfit.
    """
    if checkpoints.latest_step() is None:
        return _start(config, program, corpus), 0.0
    saved = SavedRun(checkpoints)
    if saved.meta.get("contents") == PARAMETERS_ONLY:
        raise UsageError(f"--workdir={saved.workdir} holds imported weights without an optimizer's state; "
                         f"train in another --workdir with --config.init_from={saved.workdir}")
    state = saved.restore(program.abstract_state)
    if saved.step > config.num_steps:
        raise UsageError(f"the run is at step {saved.step}, past config.num_steps {config.num_steps}; "
                         "raise config.num_steps, or use another --workdir")
    if saved.meta["corpus"] != corpus.fingerprint:
        raise UsageError(
            f"the corpus changed since checkpoint {saved.step}: it had {saved.meta['corpus']} and is now "
            f"{corpus.fingerprint}; restore the files, change config.data.source or config.data.tokenizer, "
            "or use another --workdir")
    changed = _differences(config_from_saved(saved.meta["config"], RunConfig), config)
    if changed:
        logger.warning("resuming with a changed config: %s", "; ".join(changed))
    print(f"resuming at step {saved.step}", flush=True)
    return state, saved.meta["train_seconds"]


def _start(config: RunConfig, program: Program, corpus: Corpus | TokenCorpus | None) -> TrainState:
    """Draws random weights, and replaces those that `init_from` or, of the boundary_lm, `boundary_lm_from` has."""
    wanted, model = program.abstract_state.params, config.model
    found: dict[str, Any] = {}
    if config.init_from:
        with SavedRun.open(config.init_from, field="config.init_from") as source:
            if corpus is not None:
                _check_same_tokens(source, corpus)
            has_lm = source.config.model.boundary_lm is not None
            found |= source.params({name: wanted[name] for name in wanted if has_lm or name != "boundary_lm"})
        print(f"starting from the weights of {config.init_from}", flush=True)
    if config.boundary_lm_from:
        field = f"config.boundary_lm_from={config.boundary_lm_from}"
        if model.boundary_lm is None:
            raise UsageError(
                f"{field}: config.model has no boundary_lm; leave it empty, or use the router 'entropy'")
        with SavedRun.open(config.boundary_lm_from, field="config.boundary_lm_from") as source:
            changed = _differences(source.config.model, model.boundary_lm, "its model")
            if changed:
                raise UsageError(
                    f"{field} has another model than config.model.boundary_lm: {'; '.join(changed)} here")
            found["boundary_lm"] = source.params(wanted["boundary_lm"])
    if model.boundary_lm is not None and "boundary_lm" not in found:
        raise UsageError(
            "config.model.boundary_lm needs trained weights: train a run with that model, "
            "python -m experiments.train --config=... --workdir=runs/boundary_lm, "
            "and set --config.boundary_lm_from=runs/boundary_lm")
    if found.keys() == wanted.keys():
        return program.start(found)
    state = program.init(jax.random.key(config.seed))
    return program.start(state.params | found) if found else state


def _check_same_tokens(source: SavedRun, corpus: Corpus | TokenCorpus) -> None:
    """Refuses weights to start from whose ids stand for other text than those of `corpus`."""
    if source.tokenizer().fingerprint != corpus.fingerprint.get("tokenizer", ByteTokenizer.fingerprint):
        name = source.config.data.tokenizer
        theirs = f"the tokens of {source.workdir / name}" if name else "bytes"
        raise UsageError(f"config.init_from={source.workdir} reads {theirs}, and this run reads others; "
                         f"set --config.data.tokenizer={source.workdir / name if name else ''}")


def _on_one_device(shapes: Any) -> Any:
    sharding = replicated(make_mesh(1, jax.devices()[:1]))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def _differences(old: Any, new: Any, prefix: str = "config") -> list[str]:
    """Describes each field that two configs differ in."""
    before, after = flat_fields(old), flat_fields(new)
    return [f"{prefix}.{name} was {before.get(name)!r}, is {after.get(name)!r}"
            for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
