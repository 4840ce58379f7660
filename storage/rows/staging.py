"""A store of elsewhere as flat files of this machine: one an array, its rows one after the other.

Each object is compared with its hash while it is in memory and put where its rows belong. What is
there is kept in a journal, so a staging that was killed goes on where it was. The copy is named by
what it holds: stores with the same bytes share it, and so do the processes of this machine.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from storage import uri
from storage.errors import StorageError
from storage.manifest import FileEntry, Manifest
from storage.parallel import threads
from storage.rows import cache
from storage.rows.format import StoredArray, data_files
from storage.rows.mapped import FlatRows, mapped

DONE = "staged.json"
JOURNAL = "journal"
WORKERS = 8
"""Objects in memory at a time."""

Arrays = Mapping[str, StoredArray]


def staged(manifest: Manifest, arrays: Arrays, folder: Path | None = None) -> dict[str, FlatRows]:
    """The arrays of a store as local copies, made now if they are not there.

    Args:
        manifest: of the store.
        arrays: by name.
        folder: of the cache, as `cache.place`.

    Raises:
        StorageError: an object is missing or damaged, or the disk has no room; the line names it.
    """
    files = data_files(manifest)
    copy = cache.place(folder, "staged", cache.content(files))
    with cache.locked(copy):
        if not _whole(copy, arrays):
            _Staging(manifest, arrays, files, copy).run()
    return {name: FlatRows(stored, mapped(_flat(copy, name))) for name, stored in arrays.items()}


def to_copy(manifest: Manifest, arrays: Arrays, folder: Path | None = None) -> int:
    """Bytes that `staged` has still to copy.

    Args:
        manifest: as of `staged`.
        arrays: as of `staged`.
        folder: as of `staged`.
    """
    files = data_files(manifest)
    copy = cache.place(folder, "staged", cache.content(files))
    return sum(_length(*item) for item in _Staging(manifest, arrays, files, copy).missing())


def _flat(copy: Path, name: str) -> Path:
    return copy / f"{name}.rows"


def _versions(copy: Path, arrays: Arrays) -> dict[str, dict[str, str] | None]:
    return {name: uri.version(str(_flat(copy, name))) for name in arrays}


def _whole(copy: Path, arrays: Arrays) -> bool:
    """Whether the copy is complete and its files are as they were then. One that was changed is removed."""
    done = copy / DONE
    if not done.exists():
        return False
    with suppress(ValueError):
        if json.loads(done.read_bytes()) == _versions(copy, arrays):
            return True
    shutil.rmtree(copy)
    return False


class _Staging:
    """One copy in the making."""

    def __init__(self, manifest: Manifest, arrays: Arrays, files: list[FileEntry], copy: Path) -> None:
        self._manifest, self._arrays, self._copy = manifest, arrays, copy
        self._sizes = {entry.path: entry.size for entry in files}
        self._journal = copy / JOURNAL

    def run(self) -> None:
        """Copy what is missing, and commit."""
        missing = self.missing()
        self._check_room(missing)
        self._prepare()
        self._progress = cache.Progress("copying", self._manifest, sum(_length(*item) for item in missing))
        with threads(WORKERS) as pool:
            list(pool.map(lambda item: self._fetch(*item), missing))
        uri.write(str(self._copy / DONE), json.dumps(_versions(self._copy, self._arrays)).encode())

    def missing(self) -> list[tuple[StoredArray, int]]:
        """The objects that are not copied yet."""
        objects = [(stored, number) for stored in self._arrays.values() for number in range(stored.objects)]
        there = self._there()
        return [(stored, number) for stored, number in objects if stored.path(number) not in there]

    def _there(self) -> set[str]:
        """The objects that are copied already."""
        flat = [(_flat(self._copy, name), stored.data_bytes) for name, stored in self._arrays.items()]
        if not self._journal.exists() or any(uri.size(str(path)) != size for path, size in flat):
            return set()
        return set(self._journal.read_text().splitlines())

    def _check_room(self, missing: list[tuple[StoredArray, int]]) -> None:
        needed = sum(_length(*item) for item in missing)
        free = shutil.disk_usage(self._copy.parent).free
        if needed > free:
            raise StorageError(
                f"{self._copy}: no room for a copy of {uri.redact(self._manifest.uri)}: "
                f"{cache.gigabytes(needed)} needed, {cache.gigabytes(free)} free; make room, set XDG_CACHE_HOME "
                "to a folder on a larger disk, or train with order: pooled and reading: streamed"
            )

    def _prepare(self) -> None:
        self._copy.mkdir(exist_ok=True)
        for name, stored in self._arrays.items():
            with _flat(self._copy, name).open("ab") as file:
                file.truncate(stored.data_bytes)

    def _fetch(self, stored: StoredArray, number: int) -> None:
        path = stored.path(number)
        rows = stored.unpacked(path, self._manifest.read_object(path), number)
        first, _ = stored.rows(number)
        axis0 = number % (stored.splits or 1)
        try:
            with _flat(self._copy, stored.name).open("r+b") as file:
                file.seek((axis0 * stored.shape[0] + first) * stored.row_bytes)
                file.write(rows)
                file.flush()
                os.fsync(file.fileno())  # before the journal says so
            with self._journal.open("a") as journal:
                journal.write(f"{path}\n")
        except OSError as error:
            raise StorageError(f"{self._copy}: cannot be written ({error}); run the same command again") from error
        self._progress.add(len(rows))


def _length(stored: StoredArray, number: int) -> int:
    """Bytes of an object's rows."""
    start, stop = stored.rows(number)
    return (stop - start) * stored.row_bytes
