"""Every byte of a store is compared with its hash before it is used, once on each machine.

What was found whole is remembered by the objects' versions (size, times and inode of a file, ETag of
an object), so that a later start asks for those alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from storage import uri
from storage.manifest import OTHER_BYTES, FileEntry, Manifest
from storage.parallel import threads
from storage.rows import cache

Versions = Mapping[str, Mapping[str, str]]
"""By path."""


def trust(manifest: Manifest, files: Sequence[FileEntry], folder: Path | None = None) -> None:
    """See that committed objects hold the bytes that were committed.

    Args:
        manifest: of the output.
        files: the objects to be sure of.
        folder: of the cache, as `cache.place`.

    Raises:
        StorageError: one is missing or holds other bytes; the line names it.
    """
    found = _versions(manifest, files)
    stamp = cache.place(folder, "trusted", [manifest.uri, cache.content(files)])
    if not _stale(files, found, _read(stamp)):
        return
    with cache.locked(stamp):
        stale = _stale(files, found, _read(stamp))  # another process may have been at it
        _compare(manifest, stale)
        uri.write(str(stamp), json.dumps(found).encode())


def _versions(manifest: Manifest, files: Sequence[FileEntry]) -> Versions:
    with threads(16) as pool:
        found = list(pool.map(lambda entry: uri.version(uri.join(manifest.uri, entry.path)), files))
    return {entry.path: version or {} for entry, version in zip(files, found, strict=True)}


def _stale(files: Sequence[FileEntry], found: Versions, known: Versions) -> list[FileEntry]:
    """The objects that may have changed since; one that is absent or whose store tells no version always may."""
    return [entry for entry in files if not found[entry.path] or found[entry.path] != known.get(entry.path)]


def _read(stamp: Path) -> Versions:
    try:
        known = json.loads(stamp.read_bytes())
    except (OSError, ValueError):  # without it all is compared again
        return {}
    return known if isinstance(known, dict) else {}


def _compare(manifest: Manifest, files: Sequence[FileEntry]) -> None:
    progress = cache.Progress("checking", manifest, sum(entry.size for entry in files))

    def compare(entry: FileEntry) -> None:
        if _sha256(uri.join(manifest.uri, entry.path)) != entry.sha256:
            raise manifest.fault(entry.path, OTHER_BYTES)
        progress.add(entry.size)

    manifest.model_copy(update={"files": tuple(files)}).check_sizes()
    with threads(0) as pool:
        list(pool.map(compare, files))


def _sha256(url: str) -> str:
    """A file piece by piece; of another store in one request."""
    return uri.sha256(uri.read(url)) if uri.local_path(url) is None else uri.file_sha256(url)
