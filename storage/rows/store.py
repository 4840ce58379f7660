"""Row stores: zarr v3 groups that are written block by block and read row by row, for latents and samples.

A block of rows is the unit of work: its shard objects are built in memory, written whole and committed
by a record. Chunks are not compressed, so a reader copies rows directly out of them; each inner chunk
is followed by its crc32c.
"""

# N = rows, F = length of the first axis of a row, if that axis is split (flips), B = rows asked for

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.core.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from storage import records, uri
from storage.errors import InputError
from storage.header import FileEntry
from storage.manifest import Manifest, StageOutput
from storage.parallel import threads
from storage.rows.format import CRC_BYTES, DATA, INDEX_ENTRY_BYTES, StoredArray, data_files, stored_arrays
from storage.rows.mapped import FlatRows, ShardRows, allow_open_files
from storage.rows.staging import staged
from storage.rows.streaming import StreamedRows, loaded
from storage.rows.trust import trust
from storage.tracker import Tracker


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store, of shape (N, *shape)."""

    name: str
    dtype: str
    """A NumPy name, such as ``float16``. Values that were never written read as NaN, -1 or, if unsigned, 0."""
    shape: tuple[int, ...]
    """Shape of one row."""
    chunk_rows: int
    """Rows of an inner chunk, the unit of the checksum."""
    split_axis0: bool = False
    """Whether each index of a row's first axis has shard objects of its own."""

    def chunk(self, rows: int) -> tuple[int, ...]:
        """The shape of a chunk or shard of that many rows."""
        return (rows, 1, *self.shape[1:]) if self.split_axis0 else (rows, *self.shape)

    @property
    def objects_per_block(self) -> int:
        """Shard objects of this array in a block."""
        return self.shape[0] if self.split_axis0 else 1

    @property
    def fill(self) -> float:
        """The value of what was never written."""
        return {"f": float("nan"), "i": -1}.get(np.dtype(self.dtype).kind, 0)


@dataclass(frozen=True)
class RowLayout:
    """The arrays of a store and how their rows are cut into blocks.

    Raises:
        InputError: block_rows is not a multiple of an array's chunk_rows.
    """

    rows: int
    """N."""
    block_rows: int
    """Rows of a block, the unit that is committed; the last block may be short."""
    arrays: tuple[ArraySpec, ...]

    def __post_init__(self) -> None:
        for spec in self.arrays:
            if spec.chunk_rows < 1 or self.block_rows < 1 or self.block_rows % spec.chunk_rows:
                raise InputError(f"block_rows = {self.block_rows} is not a multiple of chunk_rows = {spec.chunk_rows}")

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.rows // self.block_rows)

    @property
    def objects(self) -> int:
        """Number of shard objects of the complete store."""
        return self.blocks * sum(spec.objects_per_block for spec in self.arrays)

    @property
    def size(self) -> int:
        """Bytes of all shard objects."""
        return sum(self._size(spec) for spec in self.arrays)

    @property
    def data_bytes(self) -> int:
        """Bytes of all rows, without checksums and shard indexes."""
        return self.rows * sum(prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in self.arrays)

    def _size(self, spec: ArraySpec) -> int:
        full_blocks, rest = divmod(self.rows, self.block_rows)
        chunks = full_blocks * (self.block_rows // spec.chunk_rows) + -(-rest // spec.chunk_rows)
        chunk = prod(spec.chunk(spec.chunk_rows)) * np.dtype(spec.dtype).itemsize + CRC_BYTES
        index = INDEX_ENTRY_BYTES * (self.block_rows // spec.chunk_rows) + CRC_BYTES
        return spec.objects_per_block * (chunks * chunk + self.blocks * index)


class RowWriter:
    """Writes a store to ``data`` below a stage's folder, in any order, from any number of processes.

    Args:
        out: the stage's output.
        layout: the arrays and blocks.
        attributes: JSON values, written as the group's attributes.

    Examples:
        >>> from storage.config import Config
        >>> from storage.manifest import stage_output
        >>> out = stage_output("memory://rows", "squares", 1, Config(), parents={}, inputs={})
        >>> writer = RowWriter(out, RowLayout(rows=6, block_rows=4, arrays=(ArraySpec("square", "int32", (), 2),)), {})
        >>> for block in writer.missing():
        ...     writer.write(block, {"square": np.arange(*writer.bounds(block), dtype=np.int32) ** 2})
        >>> store = out.commit(Manifest, writer.finish())
        >>> RowReader(store).take("square", np.array([5, 1]))
        array([25,  1], dtype=int32)
    """

    def __init__(self, out: StageOutput, layout: RowLayout, attributes: Mapping[str, Any]) -> None:
        self._out, self._layout, self._attributes = out, layout, dict(attributes)

    def missing(self) -> list[int]:
        """The blocks that are not committed yet.

        Raises:
            StorageError: a record exists and cannot be read.
        """
        paths = map(_record, range(self._layout.blocks))
        with threads(16) as pool:
            committed = pool.map(lambda path: records.load(self._out, path, records.Record), paths)
            return [block for block, record in enumerate(committed) if record is None]

    def bounds(self, block: int) -> tuple[int, int]:
        """First row of a block, and the row after its last."""
        start = block * self._layout.block_rows
        return start, min(start + self._layout.block_rows, self._layout.rows)

    def write(self, block: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write the objects of one block and commit them.

        Args:
            block: number of the block.
            arrays: by name, (rows of the block, *shape) of the layout's dtype.

        Raises:
            ValueError: names, shapes or dtypes are not those of the layout.
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

    def array(self, name: str) -> NDArray[Any]:
        """A copy of a complete array (N, *shape) whose axes are not split, once all blocks are committed.

        Raises:
            StorageError: an object is missing.
        """
        objects: dict[str, Any] = {}
        array = _create(self._layout, self._attributes, objects)[name]
        ends = (0,) * len(array.shape[1:])
        for block in range(self._layout.blocks):
            key = "/".join(map(str, (name, "c", block, *ends)))
            objects[key] = Buffer.from_bytes(uri.read(self._out.url(f"{DATA}/{key}")))
        return np.asarray(array[:])

    def finish(self) -> list[FileEntry]:
        """Check every record against its objects, write the metadata, and list all files for the manifest.

        Raises:
            StorageError: a block is not committed.
        """
        done = list(records.load_all(self._out, map(_record, range(self._layout.blocks)), records.Record))
        metadata: dict[str, Any] = {}
        _create(self._layout, self._attributes, metadata)
        written = [self._out.put(f"{DATA}/{key}", value.to_bytes()) for key, value in metadata.items()]
        return [*written, *(entry for _, entry in done), *(file for record, _ in done for file in record.files)]

    def _check(self, rows: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        expected = {spec.name: (np.dtype(spec.dtype), (rows, *spec.shape)) for spec in self._layout.arrays}
        given = {name: (values.dtype, values.shape) for name, values in arrays.items()}
        if given != expected:
            raise ValueError(f"the block needs the arrays {expected}, not {given}")


def gathered(
    parts: Iterable[Mapping[str, NDArray[Any]]], tracker: Tracker, *, start: int, total: int, unit: str
) -> dict[str, NDArray[Any]]:
    """The arrays of a block, concatenated from its batches; progress is reported after each batch.

    Args:
        parts: the batches, at least one; arrays of the same names, in the order of the rows.
        tracker: receives the progress.
        start: rows of the store that are done before this block.
        total: rows of the store.
        unit: what a row is, such as ``images``.
    """
    done = list[Mapping[str, NDArray[Any]]]()
    for part in parts:
        done.append(part)
        start += len(next(iter(part.values())))
        tracker.progress(start, total, unit)
    return {name: np.concatenate([part[name] for part in done]) for name in done[0]}


class RowReader:
    """Random access to the rows of a committed store, whose objects are checked against their hashes first.

    A local store is read in place. A remote one is copied to this machine, or streamed.

    Args:
        manifest: manifest of the stage that wrote the store.
        cache: folder for copies and for the versions of checked objects;
            ``$XDG_CACHE_HOME/ditflow`` or ``~/.cache/ditflow`` by default.
        streamed: make no copy, and fetch only the chunks that are asked for. On the first start the
            whole store is read once to check it.
        start: an id of this start, as for `trust`, to compare the whole store or its copy with its hashes again.

    Raises:
        StorageError: an object is missing or damaged, or the disk has no room for a copy; the line
            names it.
    """

    def __init__(
        self, manifest: Manifest, cache: Path | None = None, *, streamed: bool = False, start: str | None = None
    ) -> None:
        local = uri.local_path(manifest.uri)
        if streamed or local is not None:
            trust(manifest, data_files(manifest), cache, start=start)
        self.attributes, self._stored = stored_arrays(manifest)
        self._rows: Mapping[str, FlatRows | ShardRows | StreamedRows]
        if streamed:
            self._rows = _streamed(manifest, self._stored)
        elif local is None:
            self._rows = staged(manifest, self._stored, cache, start=start)
        else:
            allow_open_files(self._stored.values())
            self._rows = {name: ShardRows(stored, local) for name, stored in self._stored.items()}

    def __len__(self) -> int:
        return min(stored.shape[0] for stored in self._stored.values())

    def chunk_rows(self, name: str) -> int:
        """Rows of an inner chunk of an array.

        Raises:
            KeyError: no such array.
        """
        return self._stored[name].chunk_rows

    def expect(self, name: str, indices: NDArray[np.int64], axis0: NDArray[np.int64] | None = None) -> None:
        """Announce the rows that will be taken next, and no others: a streamed store fetches them meanwhile.

        Args:
            name: the array.
            indices: (B,) rows, in any order, repeated or not.
            axis0: (B,) as in `take`.

        Raises:
            KeyError: no such array.
            StorageError: a chunk that was announced before could not be fetched; the line names the object.
        """
        rows = self._rows[name]
        if isinstance(rows, StreamedRows):
            rows.expect(indices, np.zeros(len(indices), np.int64) if axis0 is None else axis0)

    def take(self, name: str, indices: NDArray[np.int64], axis0: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """Copies of rows of an array.

        Args:
            name: the array.
            indices: (B,) rows, in any order, repeated or not.
            axis0: (B,) index of the split first axis to take of each row; all of them by default.

        Returns:
            (B, *shape), or (B, *shape[1:]) with axis0.

        Raises:
            KeyError: no such array.
            IndexError: the store has no such row or index; the line names the store and the row.
            ValueError: axis0 is given and the array's first axis is not split.
            StorageError: streamed bytes cannot be read or are damaged; the line names the object.
        """
        stored, rows = self._stored[name], self._rows[name]
        if stored.splits is None:
            if axis0 is not None:
                raise ValueError(f"the first axis of {name!r} is not split")
            return rows.take(indices, np.zeros(len(indices), np.int64))
        if axis0 is not None:
            return rows.take(indices, axis0)
        return np.stack([rows.take(indices, np.full(len(indices), f)) for f in range(stored.splits)], axis=1)

    def array(self, name: str) -> NDArray[Any]:
        """A copy of a complete array (N, *shape).

        Raises:
            KeyError: no such array.
        """
        return self.take(name, np.arange(self._stored[name].shape[0]))


def _streamed(manifest: Manifest, arrays: Mapping[str, StoredArray]) -> dict[str, FlatRows | StreamedRows]:
    """Arrays of one number a row, such as labels, are small: they are loaded completely."""
    return {
        name: StreamedRows(stored, manifest) if stored.row else loaded(stored, manifest)
        for name, stored in arrays.items()
    }


def _record(block: int) -> str:
    return f"{records.FOLDER}/rows-{block:05d}.json"


def _create(layout: RowLayout, attributes: dict[str, Any], objects: dict[str, Any]) -> dict[str, "zarr.Array[Any]"]:
    """The arrays of an empty store in memory; what is written to them appears in the mapping as objects.

    Write through these handles only: an array that is opened again from its metadata omits empty chunks.
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
