"""Rows of a remote store without a copy: whole inner chunks by ranged requests, fetched ahead by a thread."""

# N = rows, F = length of the first axis of a row, if that axis is split (flips), B = rows asked for

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from storage import uri
from storage.manifest import Manifest
from storage.rows.format import CRC_BYTES, StoredArray
from storage.rows.mapped import FlatRows

Chunks = dict[int, NDArray[np.void]]
"""The rows of inner chunks, by number of the chunk."""


class StreamedRows:
    """The rows of one array, of which only the chunks that are read next are in memory.

    Chunks are numbered in the flat layout (F, chunks). Each is compared with its crc32c. One thread
    may call at a time.

    Args:
        stored: the array.
        manifest: the store's manifest.

    Raises:
        StorageError: a shard index cannot be read or is damaged; the line names the object.
    """

    def __init__(self, stored: StoredArray, manifest: Manifest) -> None:
        self._stored, self._manifest = stored, manifest
        self._per_block = stored.block_rows // stored.chunk_rows
        self._per_split = -(-stored.shape[0] // stored.chunk_rows)
        self._held: Chunks = {}
        self._pending: dict[int, Future[Chunks]] = {}
        self._thread = ThreadPoolExecutor(1, f"stream-{stored.name}")
        self._starts = self._indexes()

    def expect(self, indices: NDArray[np.int64], axis0: NDArray[np.int64]) -> None:
        """Fetch the chunks of the rows that will be taken next in the background, and drop all other chunks."""
        wanted = set(map(int, np.unique(self._chunks(indices, axis0))))
        self._collect([chunk for chunk, future in self._pending.items() if future.done()])
        self._held = {chunk: rows for chunk, rows in self._held.items() if chunk in wanted}
        new = sorted(wanted - self._held.keys() - self._pending.keys())
        if new:
            future = self._thread.submit(self._fetch, new)
            self._pending |= dict.fromkeys(new, future)

    def take(self, indices: NDArray[np.int64], axis0: NDArray[np.int64]) -> NDArray[Any]:
        """Copies of rows, as `ShardRows.take`.

        Raises:
            IndexError: as `StoredArray.positions`.
            StorageError: a chunk cannot be read or is damaged; the line names its object.
        """
        self._stored.positions(indices, axis0)  # checks the bounds
        chunks = self._chunks(indices, axis0)
        order = np.argsort(chunks, kind="stable")
        cuts = np.flatnonzero(np.diff(chunks[order])) + 1
        groups = np.split(order, cuts) if len(order) else []
        self._ensure([int(chunks[group[0]]) for group in groups])
        out = np.empty(len(indices), f"V{self._stored.row_bytes}")
        for group in groups:
            out[group] = self._held[int(chunks[group[0]])][indices[group] % self._stored.chunk_rows]
        return out.view(self._stored.row_type)

    def _chunks(self, indices: NDArray[np.int64], axis0: NDArray[np.int64]) -> NDArray[np.int64]:
        return axis0 * self._per_split + indices // self._stored.chunk_rows

    def _ensure(self, chunks: Sequence[int]) -> None:
        self._collect([chunk for chunk in chunks if chunk in self._pending])
        missing = [chunk for chunk in chunks if chunk not in self._held]
        if missing:
            self._held |= self._fetch(missing)

    def _collect(self, chunks: Sequence[int]) -> None:
        """Wait for the requests that these chunks are part of, and hold all that they fetched."""
        for future in {self._pending[chunk] for chunk in chunks}:
            fetched = future.result()
            self._held |= fetched
            for chunk in fetched:
                del self._pending[chunk]

    def _fetch(self, chunks: Sequence[int]) -> Chunks:
        locations = [self._location(chunk) for chunk in chunks]
        length = self._stored.chunk_bytes
        urls, starts = [self._url(number) for number, _ in locations], [start for _, start in locations]
        chunk_data = uri.read_ranges(urls, starts, [start + length for start in starts])
        rows = [data[:-CRC_BYTES] for data in chunk_data]
        for (number, start), body, data in zip(locations, rows, chunk_data, strict=True):
            if google_crc32c.value(body) != int.from_bytes(data[-CRC_BYTES:], "little"):
                raise self._manifest.fault(self._stored.path(number), f"has a damaged chunk at byte {start:,}")
        return {c: np.frombuffer(body, f"V{self._stored.row_bytes}") for c, body in zip(chunks, rows, strict=True)}

    def _location(self, chunk: int) -> tuple[int, int]:
        """Number of the object that holds a chunk, and the chunk's first byte in it."""
        axis0, chunk_of_axis = divmod(chunk, self._per_split)
        block, chunk_of_block = divmod(chunk_of_axis, self._per_block)
        number = block * (self._stored.splits or 1) + axis0
        return number, int(self._starts[number, chunk_of_block])

    def _indexes(self) -> NDArray[np.int64]:
        """The first byte of every chunk in its object, (objects, chunks of an object)."""
        stored, numbers = self._stored, range(self._stored.objects)
        sizes = {entry.path: entry.size for entry in self._manifest.files}
        stops = [sizes[stored.path(number)] for number in numbers]
        urls = [self._url(number) for number in numbers]
        indexes = uri.read_ranges(urls, [stop - stored.index_bytes for stop in stops], stops)
        starts = np.zeros((len(numbers), self._per_block), np.int64)
        for number, index in enumerate(indexes):
            chunk_starts = stored.chunk_starts(uri.redact(urls[number]), index, stops[number], number)
            starts[number, : len(chunk_starts)] = chunk_starts
        return starts

    def _url(self, number: int) -> str:
        return uri.join(self._manifest.uri, self._stored.path(number))


def loaded(stored: StoredArray, manifest: Manifest) -> FlatRows:
    """A small array, read completely and kept in memory.

    Raises:
        StorageError: an object is missing or damaged; the line names it.
    """
    data = np.empty((stored.splits or 1, stored.shape[0] * stored.row_bytes), np.uint8)
    for number in range(stored.objects):
        path = stored.path(number)
        start, stop = (row * stored.row_bytes for row in stored.rows(number))
        rows = stored.unpacked(path, manifest.read_object(path), number)
        data[number % (stored.splits or 1), start:stop] = np.frombuffer(rows, np.uint8)
    return FlatRows(stored, data.reshape(-1))
