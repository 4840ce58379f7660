"""The arrays of a committed row store as its metadata tells them, and where rows lie in their objects.

Only stores as `storage.rows.store` writes them are read: shard objects (zarr v3, sharding_indexed) of
uncompressed chunks, each followed by its crc32c, with the index at the end.
"""

# N = rows, F = first axis of a row, when it is split (flips)

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.buffer import cpu
from zarr.codecs import Crc32cCodec, ShardingCodec
from zarr.storage import MemoryStore

from storage import uri
from storage.errors import StorageError
from storage.manifest import FileEntry, Manifest

DATA = "data"
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
"""Where an inner chunk begins, and its length."""

_MISSING = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class StoredArray:
    """One array of a store; its objects are numbered by block and then by the split axis."""

    name: str
    dtype: np.dtype[Any]
    """Little-endian."""
    shape: tuple[int, ...]
    """(N, *shape of a row)."""
    block_rows: int
    """Rows of an object, but for the last ones."""
    chunk_rows: int
    """Rows of an inner chunk; the last one of an object may be filled up."""
    splits: int | None
    """F, or None if the first axis of a row is not split."""

    @cached_property
    def row(self) -> tuple[int, ...]:
        """Shape of what one index of rows and one of the split axis give."""
        return self.shape[1:] if self.splits is None else self.shape[2:]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of such a row."""
        return prod(self.row) * self.dtype.itemsize

    @cached_property
    def row_type(self) -> np.dtype[Any]:
        """What a row's bytes are to be viewed as."""
        return np.dtype((self.dtype, self.row))

    @property
    def data_bytes(self) -> int:
        """Bytes of all rows, without checksums and indexes."""
        return self.shape[0] * (self.splits or 1) * self.row_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of an inner chunk with its checksum."""
        return self.chunk_rows * self.row_bytes + CRC_BYTES

    @property
    def index_bytes(self) -> int:
        """Bytes of an object's index with its checksum."""
        return INDEX_ENTRY_BYTES * (self.block_rows // self.chunk_rows) + CRC_BYTES

    @property
    def objects(self) -> int:
        """How many objects."""
        return -(-self.shape[0] // self.block_rows) * (self.splits or 1)

    def path(self, number: int) -> str:
        """Of an object, below the stage's folder."""
        block, axis0 = divmod(number, self.splits or 1)
        key = [block, *[0] * (len(self.shape) - 1)]
        if self.splits is not None:
            key[1] = axis0
        return "/".join([DATA, self.name, "c", *map(str, key)])

    def places(self, indices: NDArray[np.int64], axis0: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where rows (B,) at indices of the split axis (B,) lie if those of its first index come before all others.

        Raises:
            IndexError: a row or an index that the array does not have.
        """
        try:
            return np.ravel_multi_index((axis0, indices), (self.splits or 1, self.shape[0]))
        except ValueError as error:
            given = f"rows {indices.min()} to {indices.max()} of {self.shape[0]}"
            split = f"first-axis indices {axis0.min()} to {axis0.max()} of {self.splits or 1}"
            raise IndexError(f"{self.name}: {given}, {split}") from error

    def rows(self, number: int) -> tuple[int, int]:
        """The first row in an object and the row after its last."""
        start = number // (self.splits or 1) * self.block_rows
        return start, min(start + self.block_rows, self.shape[0])

    def chunk_starts(self, where: str, index: bytes, size: int, number: int) -> NDArray[np.int64]:
        """Where an object's inner chunks begin.

        Args:
            where: the object, for the error.
            index: its last `index_bytes`.
            size: its length.
            number: the object's.

        Raises:
            StorageError: the index is damaged or does not fit, or a chunk that holds rows is missing.
        """
        body, checksum = index[:-CRC_BYTES], index[-CRC_BYTES:]
        if len(index) < self.index_bytes or google_crc32c.value(body) != int.from_bytes(checksum, "little"):
            raise StorageError(f"{where}: the shard index is damaged; run the stage that wrote it again")
        start, stop = self.rows(number)
        table = np.frombuffer(body, "<u8").reshape(-1, 2)[: -(-(stop - start) // self.chunk_rows)]
        if (table == _MISSING).any():
            raise StorageError(f"{where}: an inner chunk is missing; run the stage that wrote it again")
        last = size - self.index_bytes - self.chunk_bytes
        if last < 0 or (table[:, 1] != self.chunk_bytes).any() or (table[:, 0] > last).any():
            raise StorageError(f"{where}: the shard index does not fit the object; run the stage that wrote it again")
        return table[:, 0].astype(np.int64)

    def unpacked(self, where: str, data: bytes, number: int) -> bytes:
        """The rows of an object one after the other, without checksums and index.

        Raises:
            StorageError: as `chunk_starts`.
        """
        starts = self.chunk_starts(where, data[-self.index_bytes :], len(data), number)
        start, stop = self.rows(number)
        view, length = memoryview(data), self.chunk_rows * self.row_bytes
        return b"".join(view[first : first + length] for first in starts)[: (stop - start) * self.row_bytes]


def data_files(manifest: Manifest) -> list[FileEntry]:
    """The committed objects of the arrays and their metadata."""
    return [entry for entry in manifest.files if entry.path.startswith(f"{DATA}/")]


def stored_arrays(manifest: Manifest) -> tuple[dict[str, Any], dict[str, StoredArray]]:
    """The attributes of a store, and its arrays by name.

    Raises:
        StorageError: the metadata is missing or damaged, or of a store of another kind; the line names it.
    """
    paths = [entry.path for entry in data_files(manifest) if entry.path.endswith("zarr.json")]
    metadata = {path[len(DATA) + 1 :]: cpu.Buffer.from_bytes(manifest.read_object(path)) for path in paths}
    group = zarr.open_group(MemoryStore(dict(metadata)), mode="r", zarr_format=3)
    where = uri.redact(uri.join(manifest.uri, DATA))
    return dict(group.attrs), {name: _stored(where, name, array) for name, array in group.arrays()}


def _stored(where: str, name: str, array: "zarr.Array[Any]") -> StoredArray:
    codecs = tuple(getattr(array.metadata, "codecs", ()))
    plain = len(codecs) == 1 and isinstance(codecs[0], ShardingCodec) and len(codecs[0].codecs) == 2
    if not plain or not isinstance(codecs[0].codecs[1], Crc32cCodec) or not array.shards:
        raise StorageError(f"{where}/{name}: not sharded, uncompressed and with crc32c, as stores of this kind are")
    splits = array.shape[1] if array.ndim > 1 and array.shards[1] == 1 else None
    dtype = np.dtype(array.dtype).newbyteorder("<")
    return StoredArray(name, dtype, array.shape, array.shards[0], array.chunks[0], splits)
