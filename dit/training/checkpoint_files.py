"""Files of a distributed checkpoint: safetensors, and an index of the pieces in them.

`torch.distributed.checkpoint` decides which rank writes and reads which piece of which tensor. The files are
ours, since torch's own are pickles, which can run code when they are read, and nothing in them says whether a
checkpoint is complete.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from storage.config import Config
from storage.header import FileEntry

FILE_BYTES = 2**30
"""Largest file in bytes, unless a single tensor is larger. A file is held in memory while it is written or read."""


class Piece(Config):
    """Where a shard of a tensor, or all of it, is stored."""

    file: int
    """Number of the file. The piece has the tensor's name in it."""
    offset: tuple[int, ...]
    """Index of its first element in the tensor."""
    shape: tuple[int, ...]


Index = Mapping[str, Sequence[Piece]]
"""The pieces of each tensor."""


def size(pieces: Sequence[Piece]) -> torch.Size:
    """The shape of the tensor that has these pieces."""
    ends = [[begin + length for begin, length in zip(each.offset, each.shape, strict=True)] for each in pieces]
    return torch.Size(max(axis) for axis in zip(*ends, strict=True))


class Writer(StorageWriter):
    """Writes one checkpoint.

    Args:
        put: writes a file of that name; called on each rank.
        commit: commits the checkpoint, given all files and the index; called on the first rank.
    """

    def __init__(
        self, put: Callable[[str, bytes], FileEntry], commit: Callable[[tuple[FileEntry, ...], Index], None]
    ) -> None:
        self._put, self._commit = put, commit
        self._rank = 0

    def reset(self, checkpoint_id: object = None) -> None:
        """Nothing to do: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Note the rank."""
        self._rank = kwargs["rank"]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan, unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans, unchanged."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files, one after another."""
        written: list[WriteResult] = []
        for number, items in enumerate(_files(plan.items)):
            tensors = {item.index.fqn: _tensor(planner, item) for item in items}
            assert len(tensors) == len(items), "a rank has one piece of a tensor"
            entry = self._put(f"state-{self._rank:05d}-{number:03d}.safetensors", save_tensors(tensors))
            for item in items:
                shape = tensors[item.index.fqn].shape
                written.append(WriteResult(item.index, entry.size, (entry, tuple(shape))))
        return _done(written)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the files of all ranks."""
        numbers: dict[FileEntry, int] = {}
        index: dict[str, list[Piece]] = {}
        for result in (result for part in results for result in part):
            entry, shape = result.storage_data
            piece = Piece(file=numbers.setdefault(entry, len(numbers)), offset=_offset(result.index), shape=shape)
            index.setdefault(result.index.fqn, []).append(piece)
        self._commit(tuple(numbers), index)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Ids are not used: `put` knows the place."""
        return False


class Reader(StorageReader):
    """Reads one checkpoint. A file that holds a piece for this rank is read whole.

    Args:
        read: reads the file with that number.
        index: the pieces of each tensor.
    """

    def __init__(self, read: Callable[[int], bytes], index: Index) -> None:
        self._read, self._index = read, index
        self._files = {(name, piece.offset): piece.file for name, pieces in index.items() for piece in pieces}

    def reset(self, checkpoint_id: object = None) -> None:
        """Nothing to do: a reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, in torch's terms."""
        return Metadata({name: _metadata(pieces) for name, pieces in self._index.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan, unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans, unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill this rank's tensors, file by file."""
        wanted: dict[int, list[ReadItem]] = {}
        for item in plan.items:
            file = self._files[item.storage_index.fqn, _offset(item.storage_index)]
            wanted.setdefault(file, []).append(item)
        for file, items in sorted(wanted.items()):
            tensors = load_tensors(self._read(file))
            for item in items:
                begins = zip(item.storage_offsets, item.lengths, strict=True)
                piece = tensors[item.storage_index.fqn][tuple(slice(begin, begin + n) for begin, n in begins)]
                target = planner.resolve_tensor(item)
                target.detach().copy_(piece)
                planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Ids are not used: `read` knows the place."""
        return False


def _files(items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
    """The items of each file. Tensors that all ranks read are kept apart from shards that one rank reads."""
    for kind in WriteItemType:
        file: list[WriteItem] = []
        filled = 0
        for item in (item for item in items if item.type == kind):
            if file and filled + _bytes(item) > FILE_BYTES:
                yield file
                file, filled = [], 0
            file.append(item)
            filled += _bytes(item)
        if file:
            yield file


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None, "the state consists of tensors"
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _offset(index: MetadataIndex) -> tuple[int, ...]:
    assert index.offset is not None, "the state consists of tensors"
    return tuple(index.offset)


def _tensor(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach().cpu().contiguous()


def _metadata(pieces: Sequence[Piece]) -> TensorStorageMetadata:
    """Shapes alone: the dtype is that of the file."""
    chunks = [ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape)) for piece in pieces]
    return TensorStorageMetadata(TensorProperties(), size(pieces), chunks)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
