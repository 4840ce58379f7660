"""Rows in files of this machine, copied out of memory maps with one gather a call."""

# N = rows, F = length of the first axis of a row, if that axis is split (flips), B = rows asked for

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import StorageError
from storage.rows.format import StoredArray


class FlatRows:
    """The rows of one array in the flat layout (F, N).

    Args:
        stored: the array.
        data: (F * N * bytes of a row,) uint8.
    """

    def __init__(self, stored: StoredArray, data: NDArray[np.uint8]) -> None:
        self._stored = stored
        self._rows = data.view(f"V{stored.row_bytes}")

    def take(self, indices: NDArray[np.int64], axis0: NDArray[np.int64]) -> NDArray[Any]:
        """Copies of rows, as `ShardRows.take`."""
        return self._rows[self._stored.positions(indices, axis0)].view(self._stored.row_type)


class ShardRows:
    """The rows of one array, read from its shard objects in place.

    Args:
        stored: the array.
        folder: the stage's folder.

    Raises:
        StorageError: an object cannot be mapped, or its shard index is damaged; the line names the object.
    """

    def __init__(self, stored: StoredArray, folder: Path) -> None:
        self._stored = stored
        paths = [folder / stored.path(number) for number in range(stored.objects)]
        self._maps = [mapped(path) for path in paths]
        base = min(_address(data) for data in self._maps)
        starts: list[list[NDArray[np.int64]]] = [[] for _ in range(stored.splits or 1)]
        for number, (path, data) in enumerate(zip(paths, self._maps, strict=True)):
            index = data[-stored.index_bytes :].tobytes()
            chunk_starts = stored.chunk_starts(str(path), index, len(data), number)
            starts[number % len(starts)].append(chunk_starts + _address(data) - base)
        self._starts = np.array([np.concatenate(blocks) for blocks in starts])  # (F, chunks): bytes after `base`
        self._windows = _windows(self._maps, stored.row_bytes)

    def take(self, indices: NDArray[np.int64], axis0: NDArray[np.int64]) -> NDArray[Any]:
        """Copies of rows.

        Args:
            indices: (B,) rows.
            axis0: (B,) indices of the split axis; 0 if no axis is split.

        Returns:
            (B, *shape of a stored row).

        Raises:
            IndexError: as `StoredArray.positions`.
        """
        stored = self._stored
        stored.positions(indices, axis0)  # the only check of bounds: memory between the maps is not mapped
        chunk, row = np.divmod(indices, stored.chunk_rows)
        start = self._starts[axis0, chunk] + row * stored.row_bytes
        rows: NDArray[Any] = self._windows[start].view(stored.row_type)
        return rows


def mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file as a memory map.

    Raises:
        StorageError: the file cannot be mapped.
    """
    try:
        return np.memmap(path, np.uint8, "r").view(np.ndarray)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be mapped into memory ({error})") from error


def allow_open_files(arrays: Iterable[StoredArray]) -> None:
    """Raise this process's limit of open files if the memory maps need it: before Python 3.13 each holds one open.

    Raises:
        StorageError: the hard limit is too low.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = sum(stored.objects for stored in arrays)
    needed = count + 512  # for all other files
    if resource.RLIM_INFINITY != hard < needed:
        raise StorageError(f"{count:,} shard objects to map but only {hard:,} open files allowed; raise `ulimit -Hn`")
    if resource.RLIM_INFINITY != soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _address(data: NDArray[np.uint8]) -> int:
    return int(data.__array_interface__["data"][0])


def _windows(maps: list[NDArray[np.uint8]], row_bytes: int) -> NDArray[np.void]:
    """An array whose item i is the row that begins i bytes after the first map.

    It spans all maps and the addresses between them, so that one gather serves any number of objects: 256 rows
    take 60 to 75 % more time if they are gathered object by object. An item that is not within a map must not be
    read. `StoredArray.positions` checks the rows, and `StoredArray.chunk_starts` has checked where chunks begin.
    """
    lowest = min(maps, key=_address)
    span = max(_address(data) + len(data) for data in maps) - _address(lowest)
    rows = lowest[:row_bytes].view(f"V{row_bytes}")
    return np.lib.stride_tricks.as_strided(rows, (span - row_bytes + 1,), (1,), writeable=False)
