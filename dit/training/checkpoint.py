"""Checkpoints: files of safetensors, and a record that commits them.

The record is written last and holds the hashes, so a checkpoint that a kill cut short does not count.
"""

import logging
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field, ValidationError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from dit.ranks import Ranks
from dit.training.loop import TrainState
from dit.training.parallelize import holders
from dit.training.parts import Index, Piece, Reader, Writer, size
from dit.training.watch import Measured
from storage import records, uri
from storage.errors import DitflowError, StorageError
from storage.manifest import FileEntry, StageOutput

FOLDER = "checkpoints"
RECORD = "record.json"
PATIENCE = timedelta(hours=1)
"""That ranks have with each other while they save."""
LOGGER = logging.getLogger(__name__)
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is, alone


class CheckpointRecord(records.Record):
    """The commit of one checkpoint."""

    files: tuple[FileEntry, ...] = Field(min_length=1)
    """The state, in parts."""
    index: dict[str, tuple[Piece, ...]]
    """Where each tensor lies in them."""
    step: int
    """Steps taken."""
    skipped: int
    """Of them, those that changed nothing."""
    history: tuple[Measured, ...]
    """What had been measured by then."""


class Saver:
    """Saves checkpoints while training goes on, one at a time, all ranks at the same steps.

    Args:
        out: the stage's folder.
        state: what it will save.
        ranks: those that train.
        keep: how many of the newest checkpoints stay.
        keep_every: those of steps that are multiples of it stay too.
    """

    def __init__(
        self, out: StageOutput, state: TrainState, ranks: Ranks, *, keep: int, keep_every: int | None = None
    ) -> None:
        self._out, self._state, self._keep, self._keep_every = out, state, keep, keep_every
        savers = holders(state.model.parameters())
        self._saves = ranks.rank in savers
        alone = ranks.world_size == 1
        self._group = None if alone else dist.new_group(savers, timeout=PATIENCE, backend="gloo")
        self._running: Future[Any] | None = None

    def save(self, history: Sequence[Measured]) -> None:
        """Begin to save the state as it is now, when the one before is saved.

        Raises:
            StorageError: the one before could not be written.
        """
        self.wait()
        if not self._saves:
            return
        name = f"step-{self._state.step:09d}"
        commit = partial(self._commit, name, self._state.step, int(self._state.skipped), tuple(history))
        running = async_save(
            _tensors(self._state),
            storage_writer=Writer(lambda path, data: self._out.put(f"{FOLDER}/{name}/{path}", data), commit),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=self._group,
            no_dist=self._group is None,
        )
        assert isinstance(running, Future)
        self._running = running

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
            try:
                running.result()
            except CheckpointException as error:
                raise _reason(error) from None

    def close(self) -> None:
        """Wait until nothing is being saved; what that raises is told by `wait` alone."""
        if self._running is not None:
            self._running.exception()

    def _commit(
        self,
        name: str,
        step: int,
        skipped: int,
        history: tuple[Measured, ...],
        files: tuple[FileEntry, ...],
        index: Index,
    ) -> None:
        """Make a checkpoint of files, and remove those before it that are not to stay."""
        pieces = {tensor: tuple(found) for tensor, found in index.items()}
        record = CheckpointRecord(files=files, index=pieces, step=step, skipped=skipped, history=history)
        records.commit(self._out, _record(name), record, replace=True)
        older = [other for other in _names(self._out) if _step(other) <= step]  # later ones are a kill's leftovers
        for other in older[: -self._keep]:
            if self._keep_every is None or _step(other) % self._keep_every:
                uri.remove_tree(self._out.url(FOLDER, other))


class DamagedError(DitflowError):
    """A file is not what was committed."""


def load_newest(out: StageOutput, state: TrainState, ranks: Ranks) -> list[Measured]:
    """Bring the state to the newest whole checkpoint, if there is one; return what had been measured by then.

    Raises:
        StorageError: a checkpoint is there and cannot be read.
    """
    for name in reversed(ranks.agreed(_names(out))):
        record = ranks.agreed(_read(out, name) if ranks.first else None)
        if record and _restored(state, out, record, ranks):
            state.step, state.skipped = record.step, record.skipped
            return list(record.history)
        LOGGER.warning("%s: not a whole checkpoint; trying the one before it", uri.redact(out.url(FOLDER, name)))
    return []


def _read(out: StageOutput, name: str) -> CheckpointRecord | None:
    """The record of a checkpoint whose files are there in their sizes.

    Raises:
        StorageError: it has other fields, so these are somebody's weeks of work and no leftover of a kill.
    """
    url = out.url(_record(name))
    try:
        if uri.exists(url) and CheckpointRecord.model_validate_json(uri.read(url)).step != _step(name):
            return None
    except ValidationError as error:
        if error.errors()[0]["type"] != "json_invalid":  # that is a record cut short
            text = "written by another version of ditflow; go on with that one, or begin anew with --force"
            raise StorageError(f"{uri.redact(url)}: {text}") from None
    return records.load(out, _record(name), CheckpointRecord)


def _restored(state: TrainState, out: StageOutput, record: CheckpointRecord, ranks: Ranks) -> bool:
    """Bring the state to a checkpoint, unless one of its files is not what was committed."""
    room = {
        part: {name: torch.empty_like(each) for name, each in held.items()} for part, held in _tensors(state).items()
    }
    room["optimizer"] = _slots(state.optimizer, record.index)
    try:
        reader = Reader(lambda number: _whole(out, record.files[number]), record.index)
        load(dict[str, Any](room), storage_reader=reader, no_dist=ranks.world_size == 1)
    except CheckpointException as error:
        reason = _reason(error)
        if isinstance(reason, DamagedError):
            return False
        raise reason from None
    state.model.load_state_dict(room["model"])
    for name, average in state.averages.items():
        average.load_state_dict(room[name])
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in room["optimizer"].items():
        number, _, slot = name.partition(".")
        slots.setdefault(int(number), {})[slot] = tensor
    state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": slots})
    return True


def _slots(optimizer: torch.optim.Optimizer, index: Index) -> dict[str, torch.Tensor]:
    """Room for the optimizer's state, which it makes at its first step alone: dealt as the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    room = {}
    for name, pieces in index.items():
        part, _, slot = name.partition(".")
        if part == "optimizer":
            like, shape = parameters[int(slot.partition(".")[0])], size(pieces)
            room[slot] = torch.empty_like(like) if like.shape == shape else torch.empty(shape)
    return room


def _whole(out: StageOutput, entry: FileEntry) -> bytes:
    data = uri.read(out.url(entry.path))
    if uri.sha256(data) != entry.sha256:
        raise DamagedError(f"{uri.redact(out.url(entry.path))}: not what was committed")
    return data


def _reason(error: CheckpointException) -> BaseException:
    """What a rank has raised: rather an error with a line for people than one that came of it."""
    reasons = [reason for reason, _ in error.failures.values()]
    return next((reason for reason in reasons if isinstance(reason, DitflowError)), reasons[0])


def clean(out: StageOutput, step: int) -> None:
    """Remove what kills have left: checkpoints that are not whole, where the newest whole one is of that step."""
    for name in _names(out):
        if _step(name) > step or records.load(out, _record(name), CheckpointRecord) is None:
            uri.remove_tree(out.url(FOLDER, name))


def _names(out: StageOutput) -> list[str]:
    return sorted((name for name in uri.names(out.url(FOLDER)) if re.fullmatch(r"step-\d{9,}", name)), key=_step)


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _record(name: str) -> str:
    return f"{FOLDER}/{name}/{RECORD}"


def _tensors(state: TrainState) -> dict[str, dict[str, torch.Tensor]]:
    """All that changes, under the names that it has in a checkpoint."""
    slots = state.optimizer.state_dict()["state"]
    return {
        "model": state.model.state_dict(),
        **{name: average.state_dict() for name, average in state.averages.items()},
        "optimizer": {f"{number}.{slot}": each for number, held in slots.items() for slot, each in held.items()},
    }
