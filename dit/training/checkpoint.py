"""Checkpoints: one safetensors object and a record that commits it.

The record is written last and holds the hash, so a checkpoint that a kill cut short does not count.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from dit.training.loop import TrainState
from storage import records, uri
from storage.config import Config
from storage.manifest import FileEntry, StageOutput

FOLDER = "checkpoints"
STATE = "state.safetensors"
RECORD = "record.json"
LOGGER = logging.getLogger(__name__)


class Measured(Config):
    """What was measured at one logged step."""

    step: int
    """Optimizer steps taken, that one included."""
    values: dict[str, float]
    """The loss, its parts and the norm of the gradient, of the whole batch."""


class CheckpointRecord(records.Record):
    """The commit of one checkpoint."""

    files: tuple[FileEntry]
    """The state."""
    step: int
    """Steps taken."""
    skipped: int
    """Of them, those that changed nothing."""
    history: tuple[Measured, ...]
    """What had been measured by then."""


def save(out: StageOutput, state: TrainState, history: Sequence[Measured], *, keep: int) -> None:
    """Commit a checkpoint of the state, then remove those before it but the newest ``keep`` with this one.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    name = f"step-{state.step:09d}"
    entry = out.put(f"{FOLDER}/{name}/{STATE}", save_tensors(_tensors(state)))
    record = CheckpointRecord(files=(entry,), step=state.step, skipped=int(state.skipped), history=tuple(history))
    records.commit(out, _record(name), record, replace=True)
    older = [other for other in uri.names(out.url(FOLDER)) if other <= name]  # later ones are a kill's leftovers
    for other in older[:-keep]:
        uri.remove_tree(out.url(FOLDER, other))


def load_newest(out: StageOutput, state: TrainState) -> list[Measured]:
    """Bring the state to the newest whole checkpoint, if there is one; return what had been measured by then.

    Raises:
        StorageError: a checkpoint is there and cannot be read.
    """
    for name in reversed(uri.names(out.url(FOLDER))):
        record = records.load(out, _record(name), CheckpointRecord)
        data = uri.read(out.url(record.files[0].path)) if record else b""
        if record and uri.sha256(data) == record.files[0].sha256:
            _restore(state, load_tensors(data))
            state.step, state.skipped = record.step, record.skipped
            return list(record.history)
        LOGGER.warning("%s: not a whole checkpoint; trying the one before it", uri.redact(out.url(FOLDER, name)))
    return []


def _record(name: str) -> str:
    return f"{FOLDER}/{name}/{RECORD}"


def _tensors(state: TrainState) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.state_dict().items()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _restore(state: TrainState, tensors: dict[str, torch.Tensor]) -> None:
    state.model.load_state_dict(_below("model.", tensors))
    state.ema.load_state_dict(_below("ema.", tensors))
    slots: dict[int, dict[str, Any]] = {}
    for name, tensor in _below("optimizer.", tensors).items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = tensor
    state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": slots})


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
