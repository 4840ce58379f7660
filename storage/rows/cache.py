"""The cache of this machine: a folder that its processes share under file locks."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock

from storage import uri
from storage.errors import StorageError, one_line
from storage.header import FileEntry, short_digest
from storage.manifest import Manifest
from storage.seal import json_digest

LOGGER = logging.getLogger(__name__)

LOG_SECONDS = 5.0
"""Seconds between two log lines of progress."""


def root() -> Path:
    """The default cache folder: ``$XDG_CACHE_HOME/ditflow`` or ``~/.cache/ditflow``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditflow"


def entry_path(cache: Path | None, kind: str, key: object) -> Path:
    """The path of a cache entry, named by the hash of its key.

    Args:
        cache: the cache folder; `root` by default.
        kind: folder of entries of the same kind, such as ``staged``.
        key: JSON value of all that the entry depends on.
    """
    return (cache or root()) / kind / short_digest(json_digest(key))


@contextmanager
def making(url: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Be the only process of this machine that makes an output. Where the cache cannot be written, only warn.

    Args:
        url: of the output.
        waiting: as of `locked`.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(entry_path(None, "making", uri.absolute(url)), waiting))
        except (StorageError, RuntimeError) as error:  # RuntimeError: this user has no home
            LOGGER.warning("%s; do not let two commands make the same output at once", one_line(error))
        yield


def content_key(files: Sequence[FileEntry]) -> list[list[str]]:
    """Paths and hashes of objects, as part of a key."""
    return [[entry.path, entry.sha256] for entry in files]


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[int]:
    """Hold a lock against the other processes of this machine. The system frees the lock of a killed process.

    On a file system without locks there is only a warning.

    Args:
        path: the cache entry that is locked; the lock file lies beside it.
        waiting: says that another process holds the lock. Default: a line in the log.

    Yields:
        The lock file's descriptor. A child that keeps it open holds the lock too: if this process is killed, or the
        block raises, the lock is free when the child has ended.

    Raises:
        StorageError: the folder is not writable.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")
    except OSError as error:
        remedy = "choose a writable folder; for the cache set XDG_CACHE_HOME"
        raise StorageError(f"{lock}: cannot be written ({error}); {remedy}") from error
    with file:
        held = sys.platform != "win32"
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is None:
                    LOGGER.info("waiting for another process that is preparing %s", path)
                else:
                    waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                LOGGER.warning("%s: no locks here (%s); do not start two commands at once", lock, error.strerror)
                held = False
        yield file.fileno()
        if held:
            fcntl.flock(file, fcntl.LOCK_UN)


class Progress:
    """Logs the progress of a task that reads a store every `LOG_SECONDS`; a shorter task logs nothing.

    Args:
        task: such as ``checking``.
        manifest: the store's manifest.
        total: bytes to process.
    """

    def __init__(self, task: str, manifest: Manifest, total: int) -> None:
        self._task, self._total, self._done = f"{task} {uri.redact(manifest.uri)}", total, 0
        self._lock, self._last_log = Lock(), time.monotonic()

    def add(self, count: int) -> None:
        """Count more bytes as processed; any thread may call."""
        with self._lock:
            self._done += count
            if time.monotonic() - self._last_log >= LOG_SECONDS:
                self._last_log = time.monotonic()
                LOGGER.info("%s: %s of %s", self._task, gigabytes(self._done), gigabytes(self._total))


def gigabytes(count: int) -> str:
    """A number of bytes as text, in GB."""
    return f"{count / 1e9:,.2f} GB"
