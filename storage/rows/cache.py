"""What this machine keeps for itself: a folder that its processes share, one at work while the others wait."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from storage import uri
from storage.errors import StorageError
from storage.manifest import FileEntry, Manifest, json_digest, short_digest

LOGGER = logging.getLogger(__name__)

SECONDS_BETWEEN = 5.0
"""Between two words of progress."""


def root() -> Path:
    """The folder of all that this machine keeps: ``$XDG_CACHE_HOME/ditflow`` or ``~/.cache/ditflow``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditflow"


def place(cache: Path | None, kind: str, key: object) -> Path:
    """Where something of that kind is kept, named by the hash of a JSON value.

    Args:
        cache: folder; `root` by default.
        kind: such as ``staged``.
        key: what it depends on.
    """
    return (cache or root()) / kind / short_digest(json_digest(key))


def content(files: Sequence[FileEntry]) -> list[list[str]]:
    """What objects hold, as part of a key."""
    return [[entry.path, entry.sha256] for entry in files]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among the processes of this machine, for the length of the block. The system frees a dead one's lock.

    Args:
        path: what they share; the lock lies beside it.

    Raises:
        StorageError: the cache cannot be written.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")
    except OSError as error:
        raise StorageError(f"{lock}: cannot be written ({error}); set XDG_CACHE_HOME to a folder that can") from error
    with file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                LOGGER.info("waiting for another process that prepares %s", path)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Progress:
    """Says how far a long work on a store is, every few seconds, and nothing about a short one.

    Args:
        doing: such as ``checking``.
        manifest: of the store.
        total: bytes to go through.
    """

    def __init__(self, doing: str, manifest: Manifest, total: int) -> None:
        self._what, self._total, self._done = f"{doing} {uri.redact(manifest.uri)}", total, 0
        self._lock, self._told = Lock(), time.monotonic()

    def add(self, count: int) -> None:
        """So many bytes more are done; any thread may say so."""
        with self._lock:
            self._done += count
            if time.monotonic() - self._told >= SECONDS_BETWEEN:
                self._told = time.monotonic()
                LOGGER.info("%s: %s of %s", self._what, gigabytes(self._done), gigabytes(self._total))


def gigabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:,.2f} GB"
