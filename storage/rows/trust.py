"""Checks every object of a store against its hash before first use, once on each machine or at every start.

The versions of the checked objects (size, times and inode of a file, ETag of an object) are kept in
the cache. Unless every start checks all, later ones read the versions alone and check only the objects
whose version has changed. They do not notice bits that flip on the disk, which change no version.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from storage import uri
from storage.header import FileEntry
from storage.manifest import OTHER_BYTES, Manifest
from storage.parallel import threads
from storage.rows import cache

Versions = Mapping[str, Mapping[str, str]]
"""Version of each object, by path."""


class _Stamp(NamedTuple):
    """What is known of the last check."""

    start: str | None
    """Id of the start that checked all objects, if it had one."""
    versions: Versions


def trust(
    manifest: Manifest, files: Sequence[FileEntry], folder: Path | None = None, *, start: str | None = None
) -> None:
    """Check that committed objects hold the bytes that were committed.

    Args:
        manifest: the output's manifest.
        files: the objects to check.
        folder: the cache folder, as `cache.entry_path`.
        start: an id of this start, the same on all its ranks: all objects are checked, unless one of its ranks has
            done it. By default only those are that have changed since an earlier check.

    Raises:
        StorageError: an object is missing or holds other bytes; the line names it.
    """
    current = _versions(manifest, files)
    stamp = cache.entry_path(folder, "trusted", [manifest.uri, cache.content_key(files)])
    if not _unchecked(files, current, _read(stamp), start):
        return
    with cache.locked(stamp):
        # Read again: another process may have checked meanwhile.
        _check(manifest, _unchecked(files, current, _read(stamp), start))
        uri.write(str(stamp), json.dumps(_Stamp(start, current)).encode())


def _versions(manifest: Manifest, files: Sequence[FileEntry]) -> Versions:
    with threads(16) as pool:
        versions = list(pool.map(lambda entry: uri.version(uri.join(manifest.uri, entry.path)), files))
    return {entry.path: version or {} for entry, version in zip(files, versions, strict=True)}


def _unchecked(files: Sequence[FileEntry], current: Versions, last: _Stamp, start: str | None) -> list[FileEntry]:
    """The objects to check: all at a new start, else those that may have changed, as those without a version may."""
    checked = last.versions if start in (None, last.start) else {}
    return [entry for entry in files if not current[entry.path] or current[entry.path] != checked.get(entry.path)]


def _read(stamp: Path) -> _Stamp:
    try:
        start, versions = json.loads(stamp.read_bytes())
    except (OSError, ValueError):  # missing or damaged: every object is checked again
        return _Stamp(None, {})
    return _Stamp(start, versions if isinstance(versions, dict) else {})


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
