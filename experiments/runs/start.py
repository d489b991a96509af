"""The state that training begins with: the newest checkpoint's, or a new one, from a seed or from other runs."""
import logging
from typing import Any

import jax

from experiments.config import RunConfig
from experiments.config.codec import flat_fields
from experiments.config.files import config_from_saved
from experiments.data import Corpus
from experiments.errors import UsageError
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.saved_run import PARAMETERS_ONLY, restore_params, saved_config
from experiments.training.step import Program, TrainState

logger = logging.getLogger(__name__)


def start_or_resume(
    config: RunConfig, program: Program, checkpoints: Checkpoints, corpus: Corpus
) -> tuple[TrainState, float]:
    """Returns the state to go on from, and the seconds that its steps have taken.

    Raises:
      UsageError: the run is another one than `config` describes, or weights to start from are missing or unfit.
    """
    if checkpoints.latest_step() is None:
        return _start(config, program), 0.0
    if checkpoints.read_meta().get("contents") == PARAMETERS_ONLY:
        workdir = checkpoints.directory.parent
        raise UsageError(f"--workdir={workdir} holds imported weights without an optimizer's state; "
                         f"train in another --workdir with --config.init_from={workdir}")
    restored = checkpoints.restore_latest(program.abstract_state)
    assert restored is not None, "there is a checkpoint"
    if restored.step > config.num_steps:
        raise UsageError(f"the run is at step {restored.step}, past config.num_steps {config.num_steps}; "
                         "raise config.num_steps, or use another --workdir")
    if restored.meta["corpus"] != corpus.fingerprint:
        raise UsageError(
            f"the corpus changed since checkpoint {restored.step}: it had {restored.meta['corpus']} and is now "
            f"{corpus.fingerprint}; restore the files, change config.data.source, or use another --workdir")
    changed = _differences(config_from_saved(restored.meta["config"], RunConfig), config)
    if changed:
        logger.warning("resuming with a changed config: %s", "; ".join(changed))
    print(f"resuming at step {restored.step}", flush=True)
    return restored.state, restored.meta["train_seconds"]


def _start(config: RunConfig, program: Program) -> TrainState:
    """Random weights, replaced by those of `init_from` and, for the boundary_lm, of `boundary_lm_from`."""
    wanted = program.abstract_state.params
    found: dict[str, Any] = {}
    if config.init_from:
        source = saved_config(config.init_from, field="config.init_from")
        names = [name for name in wanted if name != "boundary_lm" or source.model.boundary_lm is not None]
        found |= restore_params(config.init_from, {name: wanted[name] for name in names})
        print(f"starting from the weights of {config.init_from}", flush=True)
    if config.boundary_lm_from:
        found["boundary_lm"] = _restore_boundary_lm(config, wanted.get("boundary_lm"))
    if config.model.boundary_lm is not None and "boundary_lm" not in found:
        raise UsageError(
            "config.model.boundary_lm needs trained weights: train a run with that model, "
            "python -m experiments.train --config=... --workdir=runs/boundary_lm, "
            "and set --config.boundary_lm_from=runs/boundary_lm")
    if found.keys() == wanted.keys():
        return program.start(found)
    state = program.init(jax.random.key(config.seed))
    return program.start(state.params | found) if found else state


def _restore_boundary_lm(config: RunConfig, wanted: Any) -> Any:
    field = f"config.boundary_lm_from={config.boundary_lm_from}"
    if config.model.boundary_lm is None:
        raise UsageError(f"{field}: config.model has no boundary_lm; leave it empty, or use the router 'entropy'")
    source = saved_config(config.boundary_lm_from, field="config.boundary_lm_from").model
    changed = _differences(source, config.model.boundary_lm, "its model")
    if changed:
        raise UsageError(f"{field} has another model than config.model.boundary_lm: {'; '.join(changed)} here")
    return restore_params(config.boundary_lm_from, wanted)


def _differences(old: Any, new: Any, prefix: str = "config") -> list[str]:
    """Says which fields two configs differ in."""
    before, after = flat_fields(old), flat_fields(new)
    return [f"{prefix}.{name} was {before.get(name)!r}, is {after.get(name)!r}"
            for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
