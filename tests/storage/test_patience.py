import errno
import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import aiohttp
import botocore.exceptions
import pytest
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.errors import translate_boto_error
from until import until

from storage import patience, uri
from storage.errors import StorageError
from storage.parallel import threads


class Away(MemoryFileSystem):  # type: ignore[misc]
    """A store that fails some calls before or after they are made, and then answers."""

    protocol = "away"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    errors: ClassVar[list[Exception]] = []
    lost: ClassVar[list[Exception]] = []

    def _fail(self) -> None:
        if self.errors:
            raise self.errors.pop(0)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self._fail()
        return super().cat_file(path, start, end, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._fail()
        super().pipe_file(path, value, mode, **kwargs)
        if self.lost:
            raise self.lost.pop(0)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Away]]:
    import fsspec

    fsspec.register_implementation("away", Away, clobber=True)
    Away.clear_instance_cache()
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.001)
    Away.store.clear()
    Away.errors, Away.lost = [], []
    yield Away


def answered(status: int, code: str = "?") -> Exception:
    """What s3fs makes of an answer with that status."""
    response = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = translate_boto_error(botocore.exceptions.ClientError(response, "GetObject"))
    return error


PASSING = [
    ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    ConnectionResetError(),
    TimeoutError(),
    FSTimeoutError(),
    OSError(errno.EHOSTUNREACH, "no route"),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
    botocore.exceptions.ConnectTimeoutError(endpoint_url="http://x"),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
    botocore.exceptions.ConnectionClosedError(endpoint_url="http://x"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError(),
    answered(500, "InternalError"),
    answered(503, "SlowDown"),
    answered(503, "503"),
    answered(502, "502"),
    answered(504, "GatewayTimeout"),
    answered(429, "TooManyRequests"),
    answered(400, "RequestTimeout"),
    answered(409, "ConditionalRequestConflict"),
]
LASTING = [
    answered(403, "AccessDenied"),
    answered(403, "InvalidAccessKeyId"),
    answered(404, "NoSuchBucket"),
    answered(404, "404"),
    answered(400, "InvalidBucketName"),
    answered(301, "PermanentRedirect"),
    answered(412, "PreconditionFailed"),
    answered(501, "NotImplemented"),
    PermissionError(errno.EACCES, "no"),
    FileNotFoundError(errno.ENOENT, "no"),
    OSError(errno.ENOSPC, "full"),
    ValueError("?"),
    botocore.exceptions.NoCredentialsError(),
    botocore.exceptions.SSLError(endpoint_url="https://x", error="certificate"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_waited_for(error: Exception, away: type[Away], caplog: pytest.LogCaptureFixture) -> None:
    uri.write("away://x", b"data")
    away.errors = [error] * 5
    with patience.patient(500):
        assert uri.read("away://x") == b"data"
    said, again = caplog.messages
    assert said.startswith(f"the store away:// does not answer ({type(error).__name__}")
    assert said.endswith("; asking again for up to 500 s")
    assert again == "the store away:// answers again"


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_will_not_pass_is_told_at_once(error: Exception, away: type[Away]) -> None:
    away.errors = [error]
    with patience.patient(500), pytest.raises(StorageError, match="away://x: (cannot be read|no such object)"):
        uri.read("away://x")
    assert not away.errors


def test_patience_ends(away: type[Away]) -> None:
    away.errors = [ConnectionResetError("gone")] * 1000
    with patience.patient(0.05), pytest.raises(StorageError, match=r"away://x: cannot be read \(gone\)"):
        uri.read("away://x")
    assert 900 < len(away.errors) < 999
    with pytest.raises(StorageError):  # outside the block nothing waits
        uri.read("away://x")


def test_an_exclusive_create_whose_answer_was_lost_knows_its_own_object(away: type[Away]) -> None:
    for number, error in enumerate((ConnectionResetError(), answered(500), TimeoutError())):
        away.lost = [error]
        with patience.patient(500):
            assert uri.create(f"away://{number}", b"mine")
            assert uri.create(f"away://{number}", b"mine")
            assert not uri.create(f"away://{number}", b"another's")
        assert uri.read(f"away://{number}") == b"mine"


def test_ranges_and_pieces_are_waited_for(away: type[Away]) -> None:
    uri.write("away://x", bytes(range(100)))
    with patience.patient(500):
        away.errors = [TimeoutError()] * 2
        assert uri.read_ranges(["away://x"] * 2, [0, 4], [2, 6]) == [b"\0\1", b"\4\5"]
        away.errors = [answered(404)]
        with pytest.raises(StorageError, match="away://x: bytes 0 to 2 cannot be read"):
            uri.read_ranges(["away://x"] * 2, [0, 4], [2, 6])


def test_many_threads_tell_once(away: type[Away], caplog: pytest.LogCaptureFixture) -> None:
    uri.write("away://x", b"data")
    away.errors = [TimeoutError()] * 40
    with patience.patient(500), threads(8) as pool:
        assert list(pool.map(lambda _: uri.read("away://x"), range(8))) == [b"data"] * 8
    assert len(caplog.messages) % 2 == 0
    assert len(caplog.messages) < 8


def test_nobody_waits_for_a_store_once_the_work_has_failed(
    away: type[Away], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 500.0)
    away.errors = [TimeoutError()]
    caplog.set_level(logging.WARNING)
    with patience.patient(500), pytest.raises(KeyboardInterrupt), threads(1) as pool:
        future = pool.submit(uri.read, "away://x")
        until(lambda: caplog.messages)
        raise KeyboardInterrupt
    assert isinstance(future.exception(), StorageError)


def test_a_patient_store_is_as_equal_as_what_it_wraps(away: type[Away]) -> None:
    (one, _), (other, _) = uri.filesystem("away://x"), uri.filesystem("away://y")
    assert one == other
    assert hash(one) == hash(other)
    assert not hasattr(one, "no_such_thing")
