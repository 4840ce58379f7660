"""Checks every object of a store against its hash before first use, once on each machine.

The versions of the checked objects (size, times and inode of a file, ETag of an object) are kept in
the cache. Later starts read the versions alone and check only the objects whose version has changed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from storage import uri
from storage.manifest import OTHER_BYTES, FileEntry, Manifest
from storage.parallel import threads
from storage.rows import cache

Versions = Mapping[str, Mapping[str, str]]
"""Version of each object, by path."""


def trust(manifest: Manifest, files: Sequence[FileEntry], folder: Path | None = None) -> None:
    """Check that committed objects hold the bytes that were committed.

    Args:
        manifest: the output's manifest.
        files: the objects to check.
        folder: the cache folder, as `cache.entry_path`.

    Raises:
        StorageError: an object is missing or holds other bytes; the line names it.
    """
    current = _versions(manifest, files)
    stamp = cache.entry_path(folder, "trusted", [manifest.uri, cache.content_key(files)])
    if not _changed(files, current, _read(stamp)):
        return
    with cache.locked(stamp):
        changed = _changed(files, current, _read(stamp))  # read again: another process may have checked meanwhile
        _check(manifest, changed)
        uri.write(str(stamp), json.dumps(current).encode())


def _versions(manifest: Manifest, files: Sequence[FileEntry]) -> Versions:
    with threads(16) as pool:
        versions = list(pool.map(lambda entry: uri.version(uri.join(manifest.uri, entry.path)), files))
    return {entry.path: version or {} for entry, version in zip(files, versions, strict=True)}


def _changed(files: Sequence[FileEntry], current: Versions, checked: Versions) -> list[FileEntry]:
    """The objects that may have changed since they were checked; those without a version always may."""
    return [entry for entry in files if not current[entry.path] or current[entry.path] != checked.get(entry.path)]


def _read(stamp: Path) -> Versions:
    try:
        versions = json.loads(stamp.read_bytes())
    except (OSError, ValueError):  # missing or damaged: every object is checked again
        return {}
    return versions if isinstance(versions, dict) else {}


def _check(manifest: Manifest, files: Sequence[FileEntry]) -> None:
    progress = cache.Progress("checking", manifest, sum(entry.size for entry in files))

    def check(entry: FileEntry) -> None:
        if _sha256(uri.join(manifest.uri, entry.path)) != entry.sha256:
            raise manifest.fault(entry.path, OTHER_BYTES)
        progress.add(entry.size)

    manifest.model_copy(update={"files": tuple(files)}).check_sizes()
    with threads(0) as pool:
        list(pool.map(check, files))


def _sha256(url: str) -> str:
    """The hash of an object: a local file is read piece by piece, any other object in one request."""
    return uri.sha256(uri.read(url)) if uri.local_path(url) is None else uri.file_sha256(url)
