"""Arrays that grow block by block and are read row by row: a zarr v3 group, for latents and samples.

A block of rows is the unit of work: its shard objects are built in memory, put whole and committed
by a record. Chunks are not compressed, so a reader maps the shards into memory and copies rows
straight out of them; each inner chunk carries its crc32c.
"""

# N = rows, B = rows asked for, F = first axis of a row, when it is split (flips)

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ShardingCodec
from zarr.storage import MemoryStore

from storage import records, uri
from storage.errors import InputError, StorageError
from storage.manifest import FileEntry, Manifest, StageOutput, json_digest
from storage.parallel import threads
from storage.tracking import Tracker

DATA = "data"

_MISSING = np.uint64(2**64 - 1)
_CHECKSUM, _INDEX_ENTRY = 4, 16  # bytes: of a crc32c, and of where an inner chunk lies


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store, of shape (N, *shape)."""

    name: str
    dtype: str
    """A NumPy name, such as ``float16``. What was never written reads as NaN, -1 or, unsigned, 0."""
    shape: tuple[int, ...]
    """Shape of one row."""
    chunk_rows: int
    """Rows of an inner chunk, the unit of the checksum."""
    split_axis0: bool = False
    """Each index of a row's first axis gets shard objects of its own."""

    def chunk(self, rows: int) -> tuple[int, ...]:
        """The shape of a piece of that many rows."""
        return (rows, 1, *self.shape[1:]) if self.split_axis0 else (rows, *self.shape)

    @property
    def pieces(self) -> int:
        """Shard objects in a block."""
        return self.shape[0] if self.split_axis0 else 1

    @property
    def fill(self) -> float:
        """What was never written reads as this."""
        return {"f": float("nan"), "i": -1}.get(np.dtype(self.dtype).kind, 0)


@dataclass(frozen=True)
class RowLayout:
    """The arrays of a store and how their rows are cut into blocks.

    Raises:
        InputError: block_rows is no multiple of an array's chunk_rows.
    """

    rows: int
    """N."""
    block_rows: int
    """Rows of a block, the unit that is committed; the last block may be short."""
    arrays: tuple[ArraySpec, ...]

    def __post_init__(self) -> None:
        for spec in self.arrays:
            if spec.chunk_rows < 1 or self.block_rows < 1 or self.block_rows % spec.chunk_rows:
                raise InputError(f"a block of {self.block_rows} rows is not made of whole chunks of {spec.chunk_rows}")

    @property
    def blocks(self) -> int:
        """How many blocks."""
        return -(-self.rows // self.block_rows)

    @property
    def objects(self) -> int:
        """How many shard objects the store has when it is whole."""
        return self.blocks * sum(spec.pieces for spec in self.arrays)

    @property
    def size(self) -> int:
        """Bytes of all those objects."""
        return sum(self._size(spec) for spec in self.arrays)

    def _size(self, spec: ArraySpec) -> int:
        whole, rest = divmod(self.rows, self.block_rows)
        chunks = whole * (self.block_rows // spec.chunk_rows) + -(-rest // spec.chunk_rows)
        chunk = prod(spec.chunk(spec.chunk_rows)) * np.dtype(spec.dtype).itemsize + _CHECKSUM
        index = _INDEX_ENTRY * (self.block_rows // spec.chunk_rows) + _CHECKSUM
        return spec.pieces * (chunks * chunk + self.blocks * index)


class RowWriter:
    """Writes a store in ``data`` below a stage's folder, in any order, from any number of processes.

    Args:
        out: the stage's folder.
        layout: the arrays.
        attributes: JSON values kept with the group.
    """

    def __init__(self, out: StageOutput, layout: RowLayout, attributes: Mapping[str, Any]) -> None:
        self._out, self._layout, self._attributes = out, layout, dict(attributes)

    def missing(self) -> list[int]:
        """The blocks that are not committed yet.

        Raises:
            StorageError: a record is there and cannot be read.
        """
        with threads(16) as pool:
            found = pool.map(
                lambda block: records.load(self._out, _record(block), records.Record), range(self._layout.blocks)
            )
            return [block for block, record in enumerate(found) if record is None]

    def bounds(self, block: int) -> tuple[int, int]:
        """The first row of a block and the row after its last."""
        start = block * self._layout.block_rows
        return start, min(start + self._layout.block_rows, self._layout.rows)

    def write(self, block: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put the objects of one block and commit them.

        Args:
            block: its number.
            arrays: by name, (rows of the block, *shape) of the layout's dtype.

        Raises:
            ValueError: the arrays are not those of the layout.
            StorageError: the disk is full, the store refuses, or another run committed this block.
        """
        start, stop = self.bounds(block)
        self._check(stop - start, arrays)
        replace = uri.exists(self._out.url(_record(block)))
        objects: dict[str, Any] = {}
        for name, array in _create(self._layout, self._attributes, objects).items():
            array[start:stop] = arrays[name]
        shards = sorted(key for key in objects if not key.endswith("zarr.json"))
        files = tuple(self._out.put(f"{DATA}/{key}", objects[key].to_bytes()) for key in shards)
        records.commit(self._out, _record(block), records.Record(files=files), replace=replace)

    def finish(self) -> list[FileEntry]:
        """Check every record against its objects, write the metadata, and describe all files for the manifest.

        Raises:
            StorageError: a block is not committed.
        """
        done = records.sealed(self._out, [_record(block) for block in range(self._layout.blocks)], records.Record)
        metadata: dict[str, Any] = {}
        _create(self._layout, self._attributes, metadata)
        described = [self._out.put(f"{DATA}/{key}", value.to_bytes()) for key, value in metadata.items()]
        return [*described, *(entry for _, entry in done), *(file for record, _ in done for file in record.files)]

    def _check(self, rows: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        wanted = {spec.name: (np.dtype(spec.dtype), (rows, *spec.shape)) for spec in self._layout.arrays}
        given = {name: (values.dtype, values.shape) for name, values in arrays.items()}
        if wanted != given:
            raise ValueError(f"the block needs the arrays {wanted}, not {given}")


def gathered(
    parts: Iterable[Mapping[str, NDArray[Any]]], tracker: Tracker, *, start: int, total: int, unit: str
) -> dict[str, NDArray[Any]]:
    """The arrays of a block from its batches, at least one, each told to the tracker as it comes.

    Args:
        parts: arrays of the same names, one after the other along the rows.
        tracker: learns how many rows of the store there are.
        start: first row of the block.
        total: rows of the store.
        unit: what a row is.
    """
    done = list[Mapping[str, NDArray[Any]]]()
    for part in parts:
        done.append(part)
        start += len(next(iter(part.values())))
        tracker.progress(start, total, unit)
    return {name: np.concatenate([part[name] for part in done]) for name in done[0]}


class RowReader:
    """Random access to the rows of a committed store.

    A local store is mapped into memory where it lies. Any other is copied once to a local folder,
    each object compared with its hash.

    Args:
        manifest: of the stage that wrote the store.
        cache: folder for local copies; ``$XDG_CACHE_HOME/ditflow`` or ``~/.cache/ditflow`` by default.

    Raises:
        StorageError: an object is missing, has another size, lacks inner chunks, or its index or
            metadata is damaged; the line names it. Flipped bytes of the data itself are found by
            `Manifest.verify`, which reads everything.
    """

    def __init__(self, manifest: Manifest, cache: Path | None = None) -> None:
        manifest.check_sizes()
        folder = _local_folder(manifest, cache)
        for entry in manifest.files:
            if entry.path.startswith(f"{DATA}/") and entry.path.endswith("zarr.json"):
                manifest.read_object(entry.path)
        group = zarr.open_group(folder, mode="r", zarr_format=3)
        arrays = dict(group.arrays())
        _allow_open_files(sum(prod(_grid(array)) for array in arrays.values()))
        self.attributes: dict[str, Any] = dict(group.attrs)
        self._arrays = {name: _MappedArray(folder / name, array) for name, array in arrays.items()}

    def __len__(self) -> int:
        return min(array.shape[0] for array in self._arrays.values())

    def take(self, name: str, indices: NDArray[np.int64], axis0: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """Rows of an array, copied.

        Args:
            name: the array.
            indices: (B,) rows, in any order, repeated or not.
            axis0: (B,) which index of a split first axis to take of each row; all of them by default.

        Returns:
            (B, *shape), or (B, *shape[1:]) with axis0.

        Raises:
            KeyError: no such array.
            IndexError: a row or an index that the store does not have.
            ValueError: axis0 is given and the array's first axis is not split.
        """
        array = self._arrays[name]
        if array.splits is None:
            if axis0 is not None:
                raise ValueError(f"the first axis of {name!r} is not split")
            return array.take(indices, np.zeros(len(indices), np.int64))
        if axis0 is not None:
            return array.take(indices, axis0)
        return np.stack([array.take(indices, np.full(len(indices), f)) for f in range(array.splits)], axis=1)

    def array(self, name: str) -> NDArray[Any]:
        """A whole array (N, *shape), copied.

        Raises:
            KeyError: no such array.
        """
        return self.take(name, np.arange(self._arrays[name].shape[0]))


class _MappedArray:
    """One array over its mapped shard objects, ordered by block and then by the split axis."""

    def __init__(self, folder: Path, array: "zarr.Array[Any]") -> None:
        block_rows, self._chunk_rows = _cut(folder, array)
        self.shape: tuple[int, ...] = array.shape
        self._block_rows = block_rows
        self.splits = array.shape[1] if array.ndim > 1 and array.shards and array.shards[1] == 1 else None
        self._row = array.shape[1:] if self.splits is None else array.shape[2:]
        self._dtype = np.dtype(array.dtype).newbyteorder("<")
        row_bytes = prod(self._row) * self._dtype.itemsize
        grid = _grid(array)
        self._starts = np.zeros((prod(grid), block_rows // self._chunk_rows), np.int64)
        self._windows: list[NDArray[np.uint8]] = []
        for number, key in enumerate(np.ndindex(grid)):
            rows = min(block_rows, self.shape[0] - key[0] * block_rows)
            path = folder.joinpath("c", *map(str, key))
            data = _mapped(path)
            starts = _chunk_starts(path, data, -(-rows // self._chunk_rows), block_rows, self._chunk_rows, row_bytes)
            self._starts[number, : len(starts)] = starts
            self._windows.append(np.lib.stride_tricks.sliding_window_view(data, row_bytes))

    def take(self, indices: NDArray[np.int64], axis0: NDArray[np.int64]) -> NDArray[Any]:
        """Copy rows, one gather for each shard object that holds some."""
        self._check(indices, axis0)
        block, within = np.divmod(indices, self._block_rows)
        chunk, row = np.divmod(within, self._chunk_rows)
        number = block * (self.splits or 1) + axis0
        row_bytes = prod(self._row) * self._dtype.itemsize
        start = self._starts[number, chunk] + row * row_bytes
        out = np.empty((len(indices), row_bytes), np.uint8)
        order = np.argsort(number, kind="stable")
        cuts = np.flatnonzero(np.diff(number[order])) + 1
        for group in np.split(order, cuts) if len(order) else []:
            out[group] = self._windows[number[group[0]]][start[group]]
        return out.view(self._dtype).reshape(len(indices), *self._row)

    def _check(self, indices: NDArray[np.int64], axis0: NDArray[np.int64]) -> None:
        for name, given, size in (("rows", indices, self.shape[0]), ("first-axis indices", axis0, self.splits or 1)):
            if len(given) and (given.min() < 0 or given.max() >= size):
                raise IndexError(f"{name} {given.min()} to {given.max()} of {size}")


def _record(block: int) -> str:
    return f"{records.FOLDER}/rows-{block:05d}.json"


def _create(layout: RowLayout, attributes: dict[str, Any], objects: dict[str, Any]) -> dict[str, "zarr.Array[Any]"]:
    """The arrays of an empty store in memory, whose objects appear in the mapping.

    Write through these handles only: an array opened again from its metadata leaves empty chunks out.
    """
    group = zarr.create_group(MemoryStore(objects), zarr_format=3, attributes=attributes)
    return {
        spec.name: group.create_array(
            spec.name,
            shape=(layout.rows, *spec.shape),
            shards=spec.chunk(layout.block_rows),
            chunks=spec.chunk(spec.chunk_rows),
            dtype=spec.dtype,
            filters=None,
            compressors=[Crc32cCodec()],
            fill_value=spec.fill,
            config={"write_empty_chunks": True},
        )
        for spec in layout.arrays
    }


def _cut(folder: Path, array: "zarr.Array[Any]") -> tuple[int, int]:
    """Rows of a block and of an inner chunk, if the array is laid out as this module writes."""
    codecs = tuple(getattr(array.metadata, "codecs", ()))
    plain = len(codecs) == 1 and isinstance(codecs[0], ShardingCodec) and len(codecs[0].codecs) == 2
    if not plain or not isinstance(codecs[0].codecs[1], Crc32cCodec) or not array.shards:
        raise StorageError(f"{folder}: not sharded, uncompressed and with crc32c, as stores of this kind are")
    return array.shards[0], array.chunks[0]


def _grid(array: "zarr.Array[Any]") -> tuple[int, ...]:
    """How many shard objects lie along each axis."""
    return tuple(-(-size // shard) for size, shard in zip(array.shape, array.shards or array.chunks, strict=True))


def _mapped(path: Path) -> NDArray[np.uint8]:
    try:
        return np.memmap(path, np.uint8, "r").view(np.ndarray)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be mapped into memory ({error})") from error


def _chunk_starts(
    path: Path, data: NDArray[np.uint8], needed: int, block_rows: int, chunk_rows: int, row_bytes: int
) -> NDArray[np.int64]:
    """Where the first inner chunks begin, from the index at the object's end (zarr v3, sharding_indexed)."""
    length = 16 * (block_rows // chunk_rows) + 4
    index = data[-length:].tobytes()
    if len(index) < length or google_crc32c.value(index[:-4]) != int.from_bytes(index[-4:], "little"):
        raise StorageError(f"{path}: the shard index is damaged; run the stage that wrote it again")
    table = np.frombuffer(index, "<u8", count=(length - 4) // 8).reshape(-1, 2)[:needed]
    if (table == _MISSING).any():
        raise StorageError(f"{path}: an inner chunk is missing; run the stage that wrote it again")
    size = chunk_rows * row_bytes + 4
    if (table[:, 1] != size).any() or (table[:, 0] > max(len(data) - length - size, 0)).any():
        raise StorageError(f"{path}: the shard index does not fit the object; run the stage that wrote it again")
    return table[:, 0].astype(np.int64)


def _local_folder(manifest: Manifest, cache: Path | None) -> Path:
    """The store on this machine, copied if it lies elsewhere."""
    local = uri.local_path(manifest.uri)
    if local is not None:
        return local / DATA
    files = [entry for entry in manifest.files if entry.path.startswith(f"{DATA}/")]
    root = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditflow"
    copy = root / json_digest([[entry.path, entry.sha256] for entry in files])[:16]
    with threads(8) as pool:
        list(pool.map(partial(_fetch, manifest, copy), files))
    return copy / DATA


def _fetch(manifest: Manifest, copy: Path, entry: FileEntry) -> None:
    target = str(copy / entry.path)
    if uri.size(target) != entry.size:
        uri.write(target, manifest.read_object(entry.path))


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files if the maps need it: each holds a descriptor before Python 3.13."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512  # for everything else
    if resource.RLIM_INFINITY != hard < needed:
        raise StorageError(f"{count:,} shard objects to map but only {hard:,} open files allowed; raise `ulimit -Hn`")
    if resource.RLIM_INFINITY != soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
