"""Checkpoints that are whole or refused: orbax does the writing, checksums say what came back.

A step directory holds two items: `state`, the arrays, and `meta`, one JSON record

  {"meta": the caller's dict, "arrays": {path: {"dtype", "shape", "checksum"}}, "crc32": of those two}

Orbax restores a flipped byte without complaint, casts to any dtype it is asked for, and counts an empty
directory as a step. So every restore compares keys, shapes, dtypes and checksums with that record.
Two things can be wrong, and they end differently. A *damaged* step is passed over, with a warning, for the
step before it. A sound step that does not *fit* the state asked for means the config changed: UsageError.
Readers change nothing on disk; the next save renames the damaged steps it would collide with.
"""
import contextlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from experiments.errors import UsageError
from experiments.runs.checksums import array_checksums, leaves_by_path
from experiments.runs.orbax_quirks import orbax_held_quiet

PyTree = Any
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Saved(NamedTuple):
    """The record of a checkpoint."""
    step: int
    meta: dict[str, Any]    # as `save` was given it
    arrays: dict[str, str]  # such as {"params/embedding": "float32[256, 64]"}


class Restored(NamedTuple):
    """A checkpoint, read."""
    step: int
    state: PyTree  # the structure, dtypes and shardings of the abstract state asked for
    meta: dict[str, Any]


class DamagedError(Exception):
    """A step that cannot be restored as it was saved; the text says what is wrong with it."""


class MisfitError(UsageError):
    """A sound step of another model; `difference` is its first array that is not as asked for."""

    def __init__(self, text: str, difference: str) -> None:
        super().__init__(text)
        self.difference = difference


class Checkpoints:
    """The checkpoints of one run, `directory/<step>`, of which the newest `keep` stay on disk."""

    def __init__(self, directory: Path | str, *, keep: int) -> None:
        """Opens `directory`, which the first save makes if it is not there."""
        if keep < 1:
            raise UsageError(f"the number of checkpoints to keep is {keep}; at least 1 is needed to resume")
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
        with orbax_held_quiet():
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._damaged: dict[int, str] = {}  # step -> what is wrong, as found by restores so far

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> bool:
        """Starts writing `state` (a pytree of jax arrays) and `meta` (JSON values) as `step`.

        Returns once the values are copied: the buffers may be donated to the next train step while a
        thread writes. An interrupted write is never listed as a step. A step that is already there was
        saved by the same run and is left alone. Returns whether anything is being written.
        """
        self._set_damaged_aside()
        if step in self._manager.all_steps():
            return False
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(_record(state, meta))
        )
        with orbax_held_quiet():  # it would report the remains of an interrupted save, which it replaces
            # Unforced, it would skip any step below the newest without a word.
            return self._manager.save(step, args=items, force=True)

    def restore_latest(self, abstract_state: PyTree, *, part: str = "") -> Restored | None:
        """Restores the newest sound step, or None if nothing was ever saved.

        Args:
          abstract_state: ShapeDtypeStructs; each leaf is restored onto its sharding, which may belong to
            another mesh than the one that saved, or else onto the first device.
          part: the entry of the saved state that `abstract_state` describes, such as "params"; nothing else is
            read then. "" is the whole.
        Raises:
          UsageError: a sound step does not fit `abstract_state`, or every step is damaged.
        """
        return self._newest_sound(lambda step: self._restore(step, abstract_state, part))

    def restore_step(self, step: int, abstract_state: PyTree, *, part: str = "") -> Restored:
        """Restores exactly `step`; raises UsageError if it is missing, damaged or does not fit."""
        return self._exactly(step, lambda step: self._restore(step, abstract_state, part))

    def read_record(self, step: int | None = None) -> Saved:
        """Reads the record of `step`, or of the newest step that has it intact."""
        found = self._newest_sound(self._saved) if step is None else self._exactly(step, self._saved)
        if found is None:
            raise UsageError(f"no checkpoint in {self.directory}; --workdir must name a run that saved one")
        return found

    def latest_step(self) -> int | None:
        """Returns the newest step not yet found damaged; one that is being written counts."""
        return max(self._sound_steps(), default=None)

    def wait(self) -> None:
        """Returns when every save is on disk; raises what went wrong while writing."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sound_steps(self) -> list[int]:
        return sorted(set(self._manager.all_steps()) - set(self._damaged), reverse=True)

    def _newest_sound(self, read: Callable[[int], T]) -> T | None:
        """Returns `read(step)` for the newest step that is not damaged, None if there are no steps at all."""
        passed_over = []
        with orbax_held_quiet():
            for step in self._sound_steps():
                try:
                    found = read(step)
                except DamagedError as error:
                    self._damaged[step] = str(error)
                    passed_over.append(step)
                    continue
                for bad in passed_over:
                    why = self._damaged[bad]
                    logger.warning("checkpoint %d is damaged: %s; using %d instead", bad, why, step)
                return found
        if not self._damaged:
            return None
        reasons = "; ".join(f"{step}: {why}" for step, why in sorted(self._damaged.items()))
        raise UsageError(
            f"every checkpoint in {self.directory} is damaged ({reasons}); "
            "restore the directory from a copy, or start again in another --workdir"
        )

    def _exactly(self, step: int, read: Callable[[int], T]) -> T:
        steps = sorted(self._manager.all_steps())
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise UsageError(f"no checkpoint {step} in {self.directory}; steps there: {there}")
        try:
            with orbax_held_quiet():
                return read(step)
        except DamagedError as error:
            raise UsageError(f"checkpoint {step} in {self.directory} is damaged: {error}") from error

    def _restore(self, step: int, abstract_state: PyTree, part: str) -> Restored:
        record, wanted = self._read_record(step), {part: abstract_state} if part else abstract_state
        saved = {path: array for path, array in record["arrays"].items() if path.startswith(part and f"{part}/")}
        self._check_fit(step, _types(saved), wanted)
        target = jax.tree.map(_placed, wanted)
        state = self._read_part(step, target) if part else self._read_item(
            step, state=ocp.args.StandardRestore(target))
        for path, checksum in array_checksums(state).items():
            if checksum != saved[path]["checksum"]:
                raise DamagedError(f"the checksum of {path} differs from the one it was saved with")
        return Restored(step, state[part] if part else state, record["meta"])

    def _saved(self, step: int) -> Saved:
        record = self._read_record(step)
        return Saved(step, record["meta"], _types(record["arrays"]))

    def _read_record(self, step: int) -> dict[str, Any]:
        record = self._read_item(step, meta=ocp.args.JsonRestore())
        if not isinstance(record, dict) or record.get("crc32") != _crc32(record):
            raise DamagedError("its meta record differs from the one that was saved")
        return record

    def _read_item(self, step: int, **item: Any) -> Any:
        (name,) = item
        with _as_damage(name):
            return self._manager.restore(step, args=ocp.args.Composite(**item))[name]

    def _read_part(self, step: int, target: PyTree) -> PyTree:
        """Restores some entries of a state, which the manager, having saved whole states, would not."""
        arguments = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True)
        with _as_damage("state"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self.directory / str(step) / "state", args=arguments)

    def _check_fit(self, step: int, saved: dict[str, str], abstract_state: PyTree) -> None:
        misfit = first_misfit(saved, array_types(abstract_state))
        if misfit:
            raise MisfitError(f"checkpoint {step} in {self.directory} does not fit this config: {misfit}; "
                              "use another --workdir or change config.model", misfit)

    def _set_damaged_aside(self) -> None:
        """Renames damaged steps to `<step>.damaged`, a name that orbax does not read as a step."""
        if not self._damaged:
            return
        if jax.process_index() == 0:
            for step in self._damaged:
                source = self.directory / str(step)
                aside = source.with_suffix(".damaged")
                number = 1
                while aside.exists():
                    number += 1
                    aside = source.with_suffix(f".damaged{number}")
                source.rename(aside)
                logger.warning("moved the damaged checkpoint %d to %s", step, aside)
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._damaged.clear()
        self._manager.reload()


def array_types(tree: PyTree) -> dict[str, str]:
    """Describes arrays, abstract or not, by path: {"params/embedding": "float32[256, 64]"}."""
    return {path: _describe(leaf.dtype, leaf.shape) for path, leaf in leaves_by_path(tree).items()}


def first_misfit(saved: dict[str, str], wanted: dict[str, str]) -> str | None:
    """Describes the first difference between two `array_types`, and counts the others; None if they are equal."""
    differing = [path for path in wanted | saved if saved.get(path) != wanted.get(path)]
    if not differing:
        return None
    path = differing[0]
    others = f" (and {len(differing) - 1} more arrays differ)" if differing[1:] else ""
    return f"{path} is {saved.get(path, 'absent')} there and {wanted.get(path, 'absent')} here{others}"


@contextlib.contextmanager
def _as_damage(name: str) -> Iterator[None]:
    """Takes whatever orbax raises for damage: what could be the caller's is checked before."""
    try:
        yield
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise DamagedError(f"{name} is unreadable, {type(error).__name__}: {first_line[:120]}") from error


def _types(arrays: dict[str, Any]) -> dict[str, str]:
    return {path: _describe(array["dtype"], array["shape"]) for path, array in arrays.items()}


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Left to itself orbax would look for the devices of the run that saved.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(dtype: Any, shape: Any) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _record(state: PyTree, meta: dict[str, Any]) -> dict[str, Any]:
    checksums = array_checksums(state)
    arrays = {
        path: {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "checksum": checksums[path]}
        for path, leaf in leaves_by_path(state).items()
    }
    record = {"meta": meta, "arrays": arrays}
    return record | {"crc32": _crc32(record)}


def _crc32(record: dict[str, Any]) -> int:
    content = {"meta": record.get("meta"), "arrays": record.get("arrays")}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
