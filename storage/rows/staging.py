"""A local copy of a remote store: one flat file an array, of the array's rows in order.

Each object is checked against its hash in memory, and its rows are written to their place in the
file. A journal lists the objects that are copied, with the crc32c of their rows, so a killed copy
resumes and a copy whose bits have flipped is mended. The copy is named by the
hashes of its objects, so stores of the same bytes share it, and so do the processes of this machine.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import google_crc32c

from storage import uri
from storage.errors import StorageError
from storage.manifest import Manifest
from storage.parallel import threads
from storage.rows import cache
from storage.rows.format import StoredArray, data_files
from storage.rows.mapped import FlatRows, mapped

LOGGER = logging.getLogger(__name__)

CHECKED = "checked"
"""Name of the file with the id of the start that last compared the copy with its journal."""
DONE = "staged.json"
JOURNAL = "journal"
WORKERS = 8
"""Objects that are copied at a time, each in memory."""

Arrays = Mapping[str, StoredArray]


def staged(
    manifest: Manifest, arrays: Arrays, folder: Path | None = None, *, start: str | None = None
) -> dict[str, FlatRows]:
    """The arrays of a store from a local copy, which is made first if needed.

    Args:
        manifest: the store's manifest.
        arrays: the store's arrays by name.
        folder: the cache folder, as `cache.entry_path`.
        start: an id of this start, as for `trust`: the whole copy is compared with its checksums, and objects whose
            rows have changed are copied again.

    Raises:
        StorageError: an object is missing or damaged, or the disk has no room; the line names it.
    """
    staging = _staging(manifest, arrays, folder)
    with cache.locked(staging.copy):
        if not _is_complete(staging.copy, arrays):
            staging.run()
        if start is not None:
            staging.check(start)
    return {name: FlatRows(stored, mapped(_flat(staging.copy, name))) for name, stored in arrays.items()}


def to_copy(manifest: Manifest, arrays: Arrays, folder: Path | None = None) -> int:
    """Bytes that `staged` has still to copy; the arguments are those of `staged`."""
    return _bytes_of(_staging(manifest, arrays, folder).missing())


def _staging(manifest: Manifest, arrays: Arrays, folder: Path | None) -> "_Staging":
    copy = cache.entry_path(folder, "staged", cache.content_key(data_files(manifest)))
    return _Staging(manifest, arrays, copy)


def _flat(copy: Path, name: str) -> Path:
    return copy / f"{name}.rows"


def _versions(copy: Path, arrays: Arrays) -> dict[str, dict[str, str] | None]:
    return {name: uri.version(str(_flat(copy, name))) for name in arrays}


def _is_complete(copy: Path, arrays: Arrays) -> bool:
    """Whether the copy was completed and its files have not changed since. A changed copy is removed."""
    done = copy / DONE
    if not done.exists():
        return False
    with suppress(ValueError):
        if json.loads(done.read_bytes()) == _versions(copy, arrays):
            return True
    shutil.rmtree(copy)
    return False


class _Staging:
    """The work of making one copy."""

    def __init__(self, manifest: Manifest, arrays: Arrays, copy: Path) -> None:
        self.copy = copy
        self._manifest, self._arrays, self._journal = manifest, arrays, copy / JOURNAL

    def run(self) -> None:
        """Copy the missing objects, and commit the copy."""
        missing = self.missing()
        self._check_room(missing)
        self._prepare()
        self._progress = cache.Progress("copying", self._manifest, _bytes_of(missing))
        with threads(WORKERS) as pool:
            list(pool.map(lambda item: self._fetch(*item), missing))
        uri.write(str(self.copy / DONE), json.dumps(_versions(self.copy, self._arrays)).encode())

    def missing(self) -> list[tuple[StoredArray, int]]:
        """The objects that are not copied yet."""
        objects = [(stored, number) for stored in self._arrays.values() for number in range(stored.objects)]
        copied = self._copied()
        return [(stored, number) for stored, number in objects if stored.path(number) not in copied]

    def check(self, start: str) -> None:
        """Compare the copy with the journal, unless this start has done it, and copy again what has changed."""
        checked = self.copy / CHECKED
        if checked.exists() and checked.read_text() == start:
            return
        copied = self._copied()
        objects = [(stored, number) for stored in self._arrays.values() for number in range(stored.objects)]
        with threads(0) as pool:
            sums = list(pool.map(lambda item: f"{google_crc32c.value(self._rows(*item)):08x}", objects))
        for (stored, number), found in zip(objects, sums, strict=True):
            if copied.get(path := stored.path(number)) != found:
                LOGGER.warning("%s: bits of the copy of %s have changed; copying it again", self.copy, path)
                copied.pop(path, None)
        if len(copied) < len(objects):
            uri.write(str(self._journal), "".join(f"{path} {crc}\n" for path, crc in copied.items()).encode())
            self.run()
        uri.write(str(checked), start.encode())

    def _copied(self) -> dict[str, str]:
        """The objects that are copied already: the crc32c of their rows, by path."""
        flat = [(_flat(self.copy, name), stored.data_bytes) for name, stored in self._arrays.items()]
        if not self._journal.exists() or any(uri.size(str(path)) != size for path, size in flat):
            return {}
        lines = (line.split(" ") for line in self._journal.read_text().splitlines())
        return {line[0]: line[1] for line in lines if len(line) == 2 and len(line[1]) == 8}

    def _check_room(self, missing: list[tuple[StoredArray, int]]) -> None:
        needed = _bytes_of(missing)
        free = shutil.disk_usage(self.copy.parent).free
        if needed > free:
            raise StorageError(
                f"{self.copy}: no room for a copy of {uri.redact(self._manifest.uri)}: "
                f"{cache.gigabytes(needed)} needed, {cache.gigabytes(free)} free; make room, set XDG_CACHE_HOME "
                "to a folder on a larger disk, or train with order: pooled and reading: streamed"
            )

    def _prepare(self) -> None:
        self.copy.mkdir(exist_ok=True)
        for name, stored in self._arrays.items():
            with _flat(self.copy, name).open("ab") as file:
                file.truncate(stored.data_bytes)

    def _fetch(self, stored: StoredArray, number: int) -> None:
        path = stored.path(number)
        rows = stored.unpacked(path, self._manifest.read_object(path), number)
        try:
            with _flat(self.copy, stored.name).open("r+b") as file:
                file.seek(_place(stored, number).start)
                file.write(rows)
                file.flush()
                os.fsync(file.fileno())  # on the disk before the journal lists it
            with self._journal.open("a") as journal:
                journal.write(f"{path} {google_crc32c.value(rows):08x}\n")
        except OSError as error:
            raise StorageError(f"{self.copy}: cannot be written ({error}); run the same command again") from error
        self._progress.add(len(rows))

    def _rows(self, stored: StoredArray, number: int) -> bytes:
        """The bytes of an object's rows in the copy."""
        place = _place(stored, number)
        try:
            with _flat(self.copy, stored.name).open("rb") as file:
                file.seek(place.start)
                return file.read(len(place))
        except OSError as error:
            raise StorageError(f"{self.copy}: cannot be read ({error}); remove it and run again") from error


def _place(stored: StoredArray, number: int) -> range:
    """Where an object's rows lie in the flat file, in bytes."""
    start, stop = ((number % (stored.splits or 1)) * stored.shape[0] + row for row in stored.rows(number))
    return range(start * stored.row_bytes, stop * stored.row_bytes)


def _bytes_of(objects: list[tuple[StoredArray, int]]) -> int:
    """Bytes of the rows of objects."""
    bounds = [(stored, stored.rows(number)) for stored, number in objects]
    return sum((stop - start) * stored.row_bytes for stored, (start, stop) in bounds)
