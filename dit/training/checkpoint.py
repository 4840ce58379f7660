"""Checkpoints: safetensors, one object for each part of the state, and a record that commits them.

The record is written last and holds the hashes, so a checkpoint that a kill cut short does not count.
"""

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from dit.ranks import Ranks
from dit.training.loop import TrainState
from dit.training.parallelize import Part, dealt, held, part_of, put_together
from storage import records, uri
from storage.config import Config
from storage.errors import StorageError
from storage.manifest import FileEntry, StageOutput

FOLDER = "checkpoints"
STATE = "state-{number}-of-{count}.safetensors"
RECORD = "record.json"
PATIENCE_SECONDS, LOOK_SECONDS = 3600.0, 0.2
"""That the first rank has with the parts of the others, and between two looks for one."""
LOGGER = logging.getLogger(__name__)


class Measured(Config):
    """What was measured at one logged step."""

    step: int
    """Optimizer steps taken, that one included."""
    values: dict[str, float]
    """The loss, its parts and the norm of the gradient, of the whole batch."""


class CheckpointRecord(records.Record):
    """The commit of one checkpoint."""

    files: tuple[FileEntry, ...] = Field(min_length=1)
    """The state, part by part."""
    step: int
    """Steps taken."""
    skipped: int
    """Of them, those that changed nothing."""
    history: tuple[Measured, ...]
    """What had been measured by then."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of a rank's part of the state in the host's memory, which training does not change."""

    part: Part
    tensors: dict[str, torch.Tensor]
    step: int
    skipped: int
    history: tuple[Measured, ...]


def snapshot(state: TrainState, history: Sequence[Measured], ranks: Ranks) -> Snapshot:
    """Copy what this rank is to save of the state, which waits for the device."""
    tensors = _tensors(state)
    part = part_of(tensors.values(), ranks)
    return Snapshot(part, held(tensors, part), state.step, int(state.skipped), tuple(history))


def save(out: StageOutput, taken: Snapshot, *, keep: int, keep_every: int | None = None) -> None:
    """Write a part of a checkpoint; with the first part commit all, when the others are there too.

    Then those before it are removed but the newest ``keep`` with this one.

    Args:
        out: the stage's folder.
        taken: the state.
        keep: how many stay.
        keep_every: those of steps that are multiples of it stay too.

    Raises:
        StorageError: the disk is full or the store refuses, or another part does not come.
    """
    name, part = f"step-{taken.step:09d}", taken.part
    paths = [f"{FOLDER}/{name}/{STATE.format(number=number, count=part.count)}" for number in range(part.count)]
    entry = out.put(paths[part.number], save_tensors(taken.tensors))
    if part.number:
        uri.write(out.url(_note(entry.path)), entry.model_dump_json().encode())
        return
    files = (entry, *(_awaited(out, path) for path in paths[1:]))
    record = CheckpointRecord(files=files, step=taken.step, skipped=taken.skipped, history=taken.history)
    records.commit(out, _record(name), record, replace=True)
    older = [other for other in _names(out) if other <= name]  # later ones are a kill's leftovers
    for other in older[:-keep]:
        if keep_every is None or _step(other) % keep_every:
            uri.remove_tree(out.url(FOLDER, other))


class Saver:
    """Commits checkpoints while training goes on, one at a time.

    Args:
        pool: of one thread.
        save: writes a snapshot.
        ranks: those that train, which all save at the same step.
    """

    def __init__(self, pool: ThreadPoolExecutor, save: Callable[[Snapshot], None], ranks: Ranks) -> None:
        self._pool, self._save, self._ranks = pool, save, ranks
        self._running: Future[None] | None = None

    def save(self, state: TrainState, history: Sequence[Measured]) -> None:
        """Begin to save the state as it is now, when the one before is saved.

        Raises:
            StorageError: the one before could not be written.
        """
        self.wait()
        taken = snapshot(state, history, self._ranks)
        if taken.part.written:
            self._running = self._pool.submit(self._save, taken)

    def check(self) -> None:
        """Raise what saving has raised, if it has ended."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait until all is saved.

        Raises:
            StorageError: it could not be written.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()


def load_newest(out: StageOutput, state: TrainState) -> list[Measured]:
    """Bring the state to the newest whole checkpoint, if there is one; return what had been measured by then.

    Raises:
        StorageError: a checkpoint is there and cannot be read.
    """
    for name in reversed(_names(out)):
        record = records.load(out, _record(name), CheckpointRecord)
        parts = _whole_parts(out, record) if record else None
        if record and parts:
            _restore(state, put_together(parts))
            state.step, state.skipped = record.step, record.skipped
            return list(record.history)
        LOGGER.warning("%s: not a whole checkpoint; trying the one before it", uri.redact(out.url(FOLDER, name)))
    return []


def _whole_parts(out: StageOutput, record: CheckpointRecord) -> list[dict[str, torch.Tensor]] | None:
    """All parts of a checkpoint, if they are what was committed."""
    parts = []
    for entry in record.files:
        data = uri.read(out.url(entry.path))
        if uri.sha256(data) != entry.sha256:
            return None
        parts.append(load_tensors(data))
    return parts


def _note(path: str) -> str:
    """Where a rank tells the first one that its part is there."""
    return f"{path}.json"


def _awaited(out: StageOutput, path: str) -> FileEntry:
    """What another rank says of its part."""
    deadline, note = time.monotonic() + PATIENCE_SECONDS, out.url(_note(path))
    while not uri.exists(note):
        if time.monotonic() > deadline:
            raise StorageError(f"{uri.redact(note)}: another rank has not saved its part of the checkpoint")
        time.sleep(LOOK_SECONDS)
    return FileEntry.model_validate_json(uri.read(note))


def clean(out: StageOutput, step: int) -> None:
    """Remove what kills have left: checkpoints that are not whole, where the newest whole one is of that step."""
    for name in _names(out):
        if _step(name) > step or records.load(out, _record(name), CheckpointRecord) is None:
            uri.remove_tree(out.url(FOLDER, name))


def _names(out: StageOutput) -> list[str]:
    return [name for name in uri.names(out.url(FOLDER)) if re.fullmatch(r"step-\d{9,}", name)]


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _record(name: str) -> str:
    return f"{FOLDER}/{name}/{RECORD}"


def _tensors(state: TrainState) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    for which, average in state.averages.items():
        tensors |= {f"{which}.{name}": tensor for name, tensor in average.state_dict().items()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items()}
    return tensors


def _restore(state: TrainState, tensors: dict[str, torch.Tensor]) -> None:
    state.model.load_state_dict(_parts("model.", tensors, state.model.state_dict()))
    for which, average in state.averages.items():
        average.load_state_dict(_parts(f"{which}.", tensors, average.state_dict()))
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, Any]] = {}
    for name, tensor in _below("optimizer.", tensors).items():
        index, _, slot = name.partition(".")
        like = parameters[int(index)]
        slots.setdefault(int(index), {})[slot] = dealt(tensor, like) if tensor.shape == like.shape else tensor
    state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": slots})


def _parts(prefix: str, tensors: dict[str, torch.Tensor], likes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors below a prefix as this rank holds them; who loads them refuses unknown names."""
    found = _below(prefix, tensors)
    return {name: dealt(tensor, likes[name]) if name in likes else tensor for name, tensor in found.items()}


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
