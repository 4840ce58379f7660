"""Waiting for a store that does not answer.

`storage.uri` reaches every store but the local disk through a `PatientStore`, so this is the one rule for all that is
read and written. A call that fails because the store is away, overloaded or broken is made again, after pauses that
grow, for as long as `patient` allows. Any other error, such as a refused key or a missing bucket, is raised at once.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import fsspec

from storage.errors import one_line

T = TypeVar("T")
LOGGER = logging.getLogger(__name__)

STAGE_SECONDS = 600.0
"""How long a stage waits for a store, unless its settings say otherwise."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between the first two calls, and most seconds between two calls."""

_CALLS = ("cat_file", "exists", "find", "glob", "info", "isdir", "isfile", "ls", "pipe_file", "rm_file")
_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)  # 409: another conditional write is being decided
_ERRNOS = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EBUSY, errno.EREMOTEIO)
_KINDS = (  # by name: the packages of the stores are optional
    *("ConnectionError", "TimeoutError", "gaierror", "IncompleteRead"),  # Python's, botocore's and urllib3's
    *("HTTPClientError", "ResponseParserError", "ClientConnectionError", "ClientPayloadError"),  # botocore, aiohttp
    *("ServiceRequestError", "ServiceResponseError", "TransportError"),  # azure, google
)
_LASTING = ("SSLError", "ClientSSLError", "CertificateError")


class _Waits:
    """What the threads of this process share."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.given_up = 0
        self.away = set[str]()
        self.changed = threading.Condition()


_WAITS = _Waits()


@contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Wait for stores for so many seconds for the length of the block, in all threads. Outside nothing waits."""
    before, _WAITS.seconds = _WAITS.seconds, seconds
    try:
        yield
    finally:
        _WAITS.seconds = before


def seconds() -> float:
    """How long a call waits for a store now."""
    return _WAITS.seconds


@contextmanager
def given_up() -> Iterator[None]:
    """Let no thread wait for a store for the length of the block, since nobody wants its answer any more."""
    with _WAITS.changed:
        _WAITS.given_up += 1
        _WAITS.changed.notify_all()
    try:
        yield
    finally:
        _WAITS.given_up -= 1


@dataclass(frozen=True)
class PatientStore:
    """A file system of fsspec whose calls are made again while the store does not answer.

    Args:
        fs: the file system. What is not a call to the store is its own.
    """

    fs: fsspec.AbstractFileSystem

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.fs, name)
        return partial(self._patiently, found) if name in _CALLS else found

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        """Open a file. What is read from it is read patiently; what is written is not, as part of it may be there."""
        file = self._patiently(self.fs.open, path, mode, **options)
        cache = getattr(file, "cache", None)
        if "r" in mode and cache is not None:
            cache.fetcher = partial(self._patiently, cache.fetcher)
        return file

    def cat_ranges(self, paths: list[str], starts: list[int], ends: list[int]) -> list[bytes | Exception]:
        """Byte ranges of objects; in the place of one that cannot be read, the error."""
        results: list[bytes | Exception] = []

        def fetch() -> None:
            results[:] = self.fs.cat_ranges(paths, starts, ends, on_error="return")
            for error in results:
                if isinstance(error, Exception) and is_transient(error):
                    raise error

        try:
            self._patiently(fetch)
        except Exception:
            if not results:
                raise
        return results

    def _patiently(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        end, pause = None, FIRST_PAUSE
        while True:
            try:
                result = call(*args, **kwargs)
                break
            except Exception as error:
                now = time.monotonic()
                end = now + _WAITS.seconds if end is None else end
                if now >= end or not is_transient(error):
                    self._waiting(False)
                    raise
                if self._waiting(True):
                    text = "%s does not answer (%s); asking again for up to %.0f s"
                    LOGGER.warning(text, self._name, one_line(error), _WAITS.seconds)
                if not _paused(min(pause, end - now)):
                    raise
                pause = min(2 * pause, LONGEST_PAUSE)
        if end is not None and self._waiting(False):
            LOGGER.warning("%s answers again", self._name)
        return result

    @property
    def _name(self) -> str:
        return f"the store {self.fs.unstrip_protocol('')}"

    def _waiting(self, waiting: bool) -> bool:
        """Note whether the store is waited for; return whether that is news."""
        with _WAITS.changed:
            news = (self._name in _WAITS.away) != waiting
            (_WAITS.away.add if waiting else _WAITS.away.discard)(self._name)
            return news


def is_transient(error: BaseException) -> bool:
    """Whether an error of a store may pass: it cannot be reached, answers too late, or says that it is the fault."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if any(lasting in kind for lasting in _LASTING for kind in kinds):
        return False
    if kinds.intersection(_KINDS):
        return True
    status = _status(error)
    if status is not None:
        return status in _STATUSES
    return isinstance(error, OSError) and error.errno in _ERRNOS


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of the answer that an error, or its cause, tells of."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        for name in ("status", "status_code", "code"):  # aiohttp, azure, gcsfs
            if isinstance(status := getattr(error, name, None), int):
                return status
        error = error.__cause__
    return None


def _paused(seconds: float) -> bool:
    """Pause; return whether to go on."""
    with _WAITS.changed:
        return not _WAITS.changed.wait_for(lambda: _WAITS.given_up, seconds)
