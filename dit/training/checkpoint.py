"""Checkpoints: safetensors files, and a record that commits them.

The record is written last and holds the hashes of the files. A checkpoint without its record is incomplete,
as a kill can leave one, and is not used.
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

from dit.ranks import Ranks, patiently
from dit.training.checkpoint_files import Index, Piece, Reader, Writer, size
from dit.training.loop import TrainState
from dit.training.parallelize import saving_ranks
from dit.training.shorter import FOLDER
from dit.training.throughput import LoggedStep
from storage import records, uri
from storage.errors import DitflowError, StorageError
from storage.header import FileEntry
from storage.manifest import StageOutput
from storage.seal import BrokenSealError, NeverSealedError

RECORD = "record.json"
TIMEOUT = timedelta(hours=1)
"""How long ranks wait for one another while they save."""
LOGGER = logging.getLogger(__name__)
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is on a single rank


class CheckpointRecord(records.Record):
    """The commit of one checkpoint."""

    files: tuple[FileEntry, ...] = Field(min_length=1)
    """Files of the state."""
    index: dict[str, tuple[Piece, ...]]
    """Pieces of each tensor in these files."""
    step: int
    """Optimizer steps taken, skipped ones included."""
    skipped: int
    """Steps skipped, because their loss or gradient was not finite."""
    history: tuple[LoggedStep, ...]
    """What was logged up to this step."""


class Saver:
    """Saves checkpoints in the background, one at a time. All ranks save at the same steps.

    Args:
        out: the stage's folder.
        state: the state to save.
        ranks: the ranks that train.
        keep: number of newest checkpoints to keep.
        keep_every: checkpoints of steps that are multiples of it are kept too.
    """

    def __init__(
        self, out: StageOutput, state: TrainState, ranks: Ranks, *, keep: int, keep_every: int | None = None
    ) -> None:
        self._out, self._state, self._keep, self._keep_every = out, state, keep, keep_every
        saving = saving_ranks(state.model.parameters())
        self._saves = ranks.rank in saving
        single = ranks.world_size == 1
        self._group = None if single else dist.new_group(saving, timeout=patiently(TIMEOUT), backend="gloo")
        self._running: Future[Any] | None = None

    def save(self, history: Sequence[LoggedStep]) -> None:
        """Wait for the previous checkpoint, then begin to save the present state.

        Raises:
            StorageError: the previous checkpoint could not be written.
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
        """Raise the error of a save that has failed. Does not wait."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is saved.

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
        """Wait until nothing is being saved. Errors are left to `wait`."""
        if self._running is not None:
            self._running.exception()

    def _commit(
        self,
        name: str,
        step: int,
        skipped: int,
        history: tuple[LoggedStep, ...],
        files: tuple[FileEntry, ...],
        index: Index,
    ) -> None:
        """Commit a checkpoint, and remove older ones that are not kept."""
        frozen = {tensor: tuple(pieces) for tensor, pieces in index.items()}
        record = CheckpointRecord(files=files, index=frozen, step=step, skipped=skipped, history=history)
        records.commit(self._out, _record(name), record, replace=True)
        prune(self._out, step, keep=self._keep, keep_every=self._keep_every)


class DamagedError(DitflowError):
    """A file differs from what was committed, or is gone."""


def load_newest(outputs: Sequence[StageOutput], state: TrainState, ranks: Ranks) -> list[LoggedStep]:
    """Restore the newest complete checkpoint of some outputs, if there is one; return what was logged up to it.

    They are listed again after each one that cannot be used: another command that trains the same output removes old
    ones, and has saved newer ones by then.

    Raises:
        StorageError: a checkpoint cannot be read.
    """
    unusable: set[tuple[int, int, str]] = set()
    while saved := ranks.agreed(_saved(outputs) - unusable if ranks.first else None):
        newest = max(saved)
        _, place, name = newest
        out = outputs[place]
        record = ranks.agreed(_read(out, name) if ranks.first else None)
        if record and _restored(state, out, record, ranks):
            state.step, state.skipped = record.step, record.skipped
            return list(record.history)
        unusable.add(newest)
        LOGGER.warning(
            "%s: checkpoint incomplete, damaged, removed or of other latents; trying the newest of the others",
            uri.redact(out.url(FOLDER, name)),
        )
    return []


def _saved(outputs: Sequence[StageOutput]) -> set[tuple[int, int, str]]:
    """Step, number of the output, and name of all checkpoints."""
    return {(_step(name), place, name) for place, out in enumerate(outputs) for name in _names(out)}


def _read(out: StageOutput, name: str) -> CheckpointRecord | None:
    """The record of a checkpoint, if its files exist in their sizes.

    Raises:
        StorageError: the record has other fields: another version wrote it, and no kill left it behind.
    """
    url = out.url(_record(name))
    try:
        data = uri.read_if_there(url)
        if data is None or records.parse(data, CheckpointRecord).step != _step(name):
            return None
    except (ValidationError, NeverSealedError):
        text = "written by another version of ditflow; resume with that version, or start again with --force"
        raise StorageError(f"{uri.redact(url)}: {text}") from None
    except BrokenSealError:
        return None
    return records.load(out, _record(name), CheckpointRecord)


def _restored(state: TrainState, out: StageOutput, record: CheckpointRecord, ranks: Ranks) -> bool:
    """Restore a checkpoint; False if one of its files differs from what was committed, or is gone."""
    buffers = {
        part: {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        for part, tensors in _tensors(state).items()
    }
    buffers["optimizer"] = _slots(state.optimizer, record.index)
    try:
        reader = Reader(lambda number: _verified(out, record.files[number]), record.index)
        load(dict[str, Any](buffers), storage_reader=reader, no_dist=ranks.world_size == 1)
    except CheckpointException as error:
        reason = _reason(error)
        if isinstance(reason, DamagedError):
            return False
        raise reason from None
    state.model.load_state_dict(buffers["model"])
    for name, average in state.averages.items():
        average.load_state_dict(buffers[name])
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in buffers["optimizer"].items():
        number, _, slot = name.partition(".")
        slots.setdefault(int(number), {})[slot] = tensor
    state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": slots})
    return True


def _slots(optimizer: torch.optim.Optimizer, index: Index) -> dict[str, torch.Tensor]:
    """Empty tensors for the optimizer's state, sharded as the parameters are. AdamW makes its own at its first step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    buffers = {}
    for name, pieces in index.items():
        part, _, slot = name.partition(".")
        if part == "optimizer":
            like, shape = parameters[int(slot.partition(".")[0])], size(pieces)
            buffers[slot] = torch.empty_like(like) if like.shape == shape else torch.empty(shape)
    return buffers


def _verified(out: StageOutput, entry: FileEntry) -> bytes:
    data = uri.read_if_there(out.url(entry.path))
    if data is None or uri.sha256(data) != entry.sha256:
        raise DamagedError(f"{uri.redact(out.url(entry.path))}: differs from what was committed")
    return data


def _reason(error: CheckpointException) -> BaseException:
    """The error of a rank, preferably one of ours: others may only follow from it."""
    reasons = [reason for reason, _ in error.failures.values()]
    return next((reason for reason in reasons if isinstance(reason, DitflowError)), reasons[0])


def prune(out: StageOutput, step: int, *, keep: int, keep_every: int | None) -> None:
    """Remove the checkpoints up to ``step`` that are neither among the ``keep`` newest nor kept for their step."""
    older = [name for name in _names(out) if _step(name) <= step]  # a later one is left from a killed run
    for name in older[:-keep]:
        if keep_every is None or _step(name) % keep_every:
            uri.remove_tree(out.url(FOLDER, name), out.uri)


def clean(out: StageOutput, step: int) -> None:
    """Remove incomplete checkpoints of killed runs, and any after ``step``, the newest complete one."""
    for name in _names(out):
        if _step(name) > step or records.load(out, _record(name), CheckpointRecord) is None:
            uri.remove_tree(out.url(FOLDER, name), out.uri)


def _names(out: StageOutput) -> list[str]:
    return sorted((name for name in uri.names(out.url(FOLDER)) if re.fullmatch(r"step-\d{9,}", name)), key=_step)


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _record(name: str) -> str:
    return f"{FOLDER}/{name}/{RECORD}"


def _tensors(state: TrainState) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of the state, by part and by name in the checkpoint."""
    slots = state.optimizer.state_dict()["state"]
    return {
        "model": state.model.state_dict(),
        **{name: average.state_dict() for name, average in state.averages.items()},
        "optimizer": {f"{number}.{slot}": tensor for number, held in slots.items() for slot, tensor in held.items()},
    }
