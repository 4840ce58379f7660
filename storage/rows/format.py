"""The arrays of a committed row store, read from its zarr metadata, and where each row lies in their objects.

Only the layout that `storage.rows.store` writes is supported: shard objects (zarr v3, sharding_indexed) of
uncompressed inner chunks, each followed by its crc32c, with the shard index at the end.
"""

# N = rows, F = length of the first axis of a row, if that axis is split (flips), B = rows asked for

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
from storage.header import FileEntry
from storage.manifest import Manifest

DATA = "data"
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
"""Two integers of 8 bytes for each inner chunk: its first byte and its length."""

_MISSING = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class StoredArray:
    """One array of a store. Its objects are numbered by block, then by index of the split axis."""

    name: str
    where: str
    """The array's URL without credentials, for errors."""
    dtype: np.dtype[Any]
    """Little-endian."""
    shape: tuple[int, ...]
    """(N, *shape of a row)."""
    block_rows: int
    """Rows of an object; the objects of the last block may hold fewer."""
    chunk_rows: int
    """Rows of an inner chunk; the last one of an object may be padded."""
    splits: int | None
    """F; None if the first axis of a row is not split."""

    @cached_property
    def row(self) -> tuple[int, ...]:
        """Shape of one stored row, without the split axis."""
        return self.shape[1:] if self.splits is None else self.shape[2:]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return prod(self.row) * self.dtype.itemsize

    @cached_property
    def row_type(self) -> np.dtype[Any]:
        """The dtype that views a row's bytes as its values."""
        return np.dtype((self.dtype, self.row))

    @property
    def data_bytes(self) -> int:
        """Bytes of all rows, without checksums and shard indexes."""
        return self.shape[0] * (self.splits or 1) * self.row_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of an inner chunk with its checksum."""
        return self.chunk_rows * self.row_bytes + CRC_BYTES

    @property
    def index_bytes(self) -> int:
        """Bytes of an object's shard index with its checksum."""
        return INDEX_ENTRY_BYTES * (self.block_rows // self.chunk_rows) + CRC_BYTES

    @property
    def objects(self) -> int:
        """Number of objects."""
        return -(-self.shape[0] // self.block_rows) * (self.splits or 1)

    def path(self, number: int) -> str:
        """Path of an object below the stage's folder."""
        block, axis0 = divmod(number, self.splits or 1)
        key = [block, *[0] * (len(self.shape) - 1)]
        if self.splits is not None:
            key[1] = axis0
        return "/".join([DATA, self.name, "c", *map(str, key)])

    def positions(self, indices: NDArray[np.int64], axis0: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions (B,) of rows in the flat layout (F, N).

        Args:
            indices: (B,) rows.
            axis0: (B,) indices of the split axis; 0 if no axis is split.

        Raises:
            IndexError: the array has no such row or index; the line names the store and the first of them.
        """
        try:
            return np.ravel_multi_index((axis0, indices), (self.splits or 1, self.shape[0]))
        except ValueError as error:
            for kind, given, count in (("row", indices, self.shape[0]), ("first-axis index", axis0, self.splits or 1)):
                outside = given[(given < 0) | (given >= count)]
                if len(outside):
                    raise IndexError(f"{self.where}: {kind} {outside[0]} is outside 0 to {count - 1}") from error
            raise

    def rows(self, number: int) -> tuple[int, int]:
        """First row of an object, and the row after its last."""
        start = number // (self.splits or 1) * self.block_rows
        return start, min(start + self.block_rows, self.shape[0])

    def chunk_starts(self, where: str, index: bytes, size: int, number: int) -> NDArray[np.int64]:
        """The first byte of each inner chunk that holds rows of an object, (chunks,) int64.

        Args:
            where: the object's URL, for errors.
            index: the last `index_bytes` of the object.
            size: bytes of the object.
            number: number of the object.

        Raises:
            StorageError: the shard index is damaged or points outside the object, or a chunk is missing.
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
        """The bytes of an object's rows, without checksums and shard index.

        Raises:
            StorageError: as `chunk_starts`.
        """
        starts = self.chunk_starts(where, data[-self.index_bytes :], len(data), number)
        start, stop = self.rows(number)
        view, length = memoryview(data), self.chunk_rows * self.row_bytes
        rows = b"".join(view[first : first + length] for first in starts)
        return rows[: (stop - start) * self.row_bytes]  # the last chunk may be padded


def data_files(manifest: Manifest) -> list[FileEntry]:
    """The committed objects of a store: shard objects and zarr metadata."""
    return [entry for entry in manifest.files if entry.path.startswith(f"{DATA}/")]


def stored_arrays(manifest: Manifest) -> tuple[dict[str, Any], dict[str, StoredArray]]:
    """The attributes of a store, and its arrays by name.

    Raises:
        StorageError: the metadata is missing, damaged, or of another layout; the line names the object.
    """
    paths = [entry.path for entry in data_files(manifest) if entry.path.endswith("zarr.json")]
    metadata = {path[len(DATA) + 1 :]: cpu.Buffer.from_bytes(manifest.read_object(path)) for path in paths}
    group = zarr.open_group(MemoryStore(dict(metadata)), mode="r", zarr_format=3)
    where = uri.redact(uri.join(manifest.uri, DATA))
    return dict(group.attrs), {name: _stored(f"{where}/{name}", name, array) for name, array in group.arrays()}


def _stored(where: str, name: str, array: "zarr.Array[Any]") -> StoredArray:
    codecs = tuple(getattr(array.metadata, "codecs", ()))
    plain = len(codecs) == 1 and isinstance(codecs[0], ShardingCodec) and len(codecs[0].codecs) == 2
    if not plain or not isinstance(codecs[0].codecs[1], Crc32cCodec) or not array.shards:
        raise StorageError(f"{where}: not a row store; its chunks must be sharded, uncompressed and have a crc32c")
    splits = array.shape[1] if array.ndim > 1 and array.shards[1] == 1 else None
    dtype = np.dtype(array.dtype).newbyteorder("<")
    return StoredArray(name, where, dtype, array.shape, array.shards[0], array.chunks[0], splits)
