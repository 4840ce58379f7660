"""Rows that lie in files of this machine: copied out of mapped memory, all of a call in one gather."""

# N = rows, F = first axis of a row, when it is split (flips), B = rows asked for

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import StorageError
from storage.rows.format import StoredArray


class FlatRows:
    """Rows one after the other, those of the first index of a split axis before those of the second.

    Args:
        stored: the array.
        data: (F * N * bytes of a row,) uint8.
    """

    def __init__(self, stored: StoredArray, data: NDArray[np.uint8]) -> None:
        self._stored = stored
        self._rows = data.view(f"V{stored.row_bytes}")

    def take(self, indices: NDArray[np.int64], axis0: NDArray[np.int64]) -> NDArray[Any]:
        """Copies of rows (B,) at indices of the split axis (B,).

        Raises:
            IndexError: as `StoredArray.places`.
        """
        return self._rows[self._stored.places(indices, axis0)].view(self._stored.row_type)


class ShardRows:
    """Rows of the shard objects of a store, where they lie.

    Args:
        stored: the array.
        folder: of the stage.

    Raises:
        StorageError: an object cannot be mapped or its index is damaged; the line names it.
    """

    def __init__(self, stored: StoredArray, folder: Path) -> None:
        self._stored = stored
        paths = [folder / stored.path(number) for number in range(stored.objects)]
        self._maps = [mapped(path) for path in paths]
        first = min(_address(data) for data in self._maps)
        starts: list[list[NDArray[np.int64]]] = [[] for _ in range(stored.splits or 1)]
        for number, (path, data) in enumerate(zip(paths, self._maps, strict=True)):
            index = data[-stored.index_bytes :].tobytes()
            found = stored.chunk_starts(str(path), index, len(data), number)
            starts[number % len(starts)].append(found + _address(data) - first)
        self._starts = np.array([np.concatenate(found) for found in starts])
        self._windows = _windows(self._maps, stored.row_bytes)

    def take(self, indices: NDArray[np.int64], axis0: NDArray[np.int64]) -> NDArray[Any]:
        """Copies of rows (B,) at indices of the split axis (B,).

        Raises:
            IndexError: as `StoredArray.places`.
        """
        stored = self._stored
        stored.places(indices, axis0)  # are there
        chunk, row = np.divmod(indices, stored.chunk_rows)
        start = self._starts[axis0, chunk] + row * stored.row_bytes
        taken: NDArray[Any] = self._windows[start].view(stored.row_type)
        return taken


def mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, read when they are used.

    Raises:
        StorageError: it cannot be mapped into memory.
    """
    try:
        return np.memmap(path, np.uint8, "r").view(np.ndarray)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be mapped into memory ({error})") from error


def allow_open_files(arrays: Iterable[StoredArray]) -> None:
    """Raise this process's limit of open files if the maps need it: each holds a descriptor before Python 3.13.

    Raises:
        StorageError: the limit cannot be raised as far.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = sum(stored.objects for stored in arrays)
    needed = count + 512  # for everything else
    if resource.RLIM_INFINITY != hard < needed:
        raise StorageError(f"{count:,} shard objects to map but only {hard:,} open files allowed; raise `ulimit -Hn`")
    if resource.RLIM_INFINITY != soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _address(data: NDArray[np.uint8]) -> int:
    return int(data.__array_interface__["data"][0])


def _windows(maps: list[NDArray[np.uint8]], row_bytes: int) -> NDArray[np.void]:
    """Item i is the row that begins i bytes after the first map.

    One array over all maps, and over the addresses between them, lets one gather serve any number
    of objects. Only rows within the maps are ever asked for.
    """
    lowest = min(maps, key=_address)
    span = max(_address(data) + len(data) for data in maps) - _address(lowest)
    rows = lowest[:row_bytes].view(f"V{row_bytes}")
    return np.lib.stride_tricks.as_strided(rows, (span - row_bytes + 1,), (1,), writeable=False)
