"""Objects by URL, on any fsspec file system: whole-object reads and atomic writes.

A URL without a scheme is a local path. Local writes go to a temporary name, are synced and
renamed, so an object is either absent or whole; object stores give that by themselves.
"""

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.errors import DitflowError, InputError, StorageError

_VERSIONS = ("mtime", "created", "ino", "ETag", "etag", "LastModified", "last_modified", "md5Hash", "generation")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256(data: bytes) -> str:
    """The hash of the bytes as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(url: str) -> str:
    """The hash of an object of any size, read piece by piece.

    Raises:
        StorageError: it is absent or cannot be read.
    """
    fs, path = filesystem(url)
    digest = hashlib.sha256()
    with _reading(url), fs.open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path in it.

    It keeps no listings: what another process has put meanwhile would not be seen.

    Raises:
        InputError: the scheme is unknown or its package is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError, OSError) as error:
        raise InputError(f"{redact(url)}: not a usable URL ({error})") from error
    return fs, str(path)


def join(url: str, *parts: str) -> str:
    """The URL of something below another."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def parent(url: str) -> str:
    """The URL of the folder that something lies in."""
    return url.rpartition("/")[0] or ("/" if url.startswith("/") else ".")


def absolute(url: str) -> str:
    """A local path made absolute; any other URL as it is."""
    path = local_path(url)
    return url if path is None else str(path)


def local_path(url: str) -> Path | None:
    """The path of a local URL, or None when the object lies elsewhere."""
    fs, path = filesystem(url)
    return Path(path) if isinstance(fs, LocalFileSystem) else None


def redact(url: str) -> str:
    """The URL without user, password and query, fit for logs and manifests."""
    if "://" not in url:
        return url
    return re.sub(r"[?#].*", "", re.sub(r"://[^/\s]*@", "://", url), flags=re.DOTALL)


def without_credentials(url: str) -> str:
    """The URL, which must carry no user and password: parameters are shown and stored in the open.

    Raises:
        ValueError: it does.
    """
    if re.search(r"://[^/]*@", url):
        raise ValueError("carries credentials; give them to the store by its environment or fsspec config")
    return url


def exists(url: str) -> bool:
    """Whether an object or folder is there.

    Raises:
        StorageError: the store does not say.
    """
    fs, path = filesystem(url)
    with _reading(url):
        return bool(fs.exists(path))


def size(url: str) -> int | None:
    """The object's size in bytes, or None when it is absent.

    Raises:
        StorageError: the store does not say.
    """
    fs, path = filesystem(url)
    try:
        with _explained(url, "read"):
            return int(fs.info(path)["size"])
    except FileNotFoundError:
        return None


def version(url: str) -> dict[str, str] | None:
    """What changes when an object is written again: its size and what its store tells beside, None when it is absent.

    Empty where a store tells nothing beside.

    Raises:
        StorageError: the store does not say.
    """
    fs, path = filesystem(url)
    try:
        with _explained(url, "read"):
            info = fs.info(path)
    except FileNotFoundError:
        return None
    found = {name: str(info[name]) for name in _VERSIONS if info.get(name)}
    return found | {"size": str(info["size"])} if found else {}


def read_ranges(urls: Sequence[str], starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
    """Parts of objects of one store, from a byte to that before another; all requests at once where the store can.

    Raises:
        StorageError: one is absent, shorter or cannot be read; the line names the first.
    """
    fs, _ = filesystem(urls[0])
    paths = [filesystem(url)[1] for url in urls]
    with _explained(urls[0], "read"):
        found = fs.cat_ranges(paths, list(starts), list(stops), on_error="return")
    for url, start, stop, data in zip(urls, starts, stops, found, strict=True):
        reason = data if isinstance(data, Exception) else f"{len(data):,} came"
        if isinstance(data, Exception) or len(data) != stop - start:
            raise StorageError(f"{redact(url)}: bytes {start:,} to {stop:,} cannot be read ({reason})")
    return [bytes(data) for data in found]


def read(url: str) -> bytes:
    """The whole object.

    Raises:
        StorageError: it is absent or cannot be read.
    """
    fs, path = filesystem(url)
    with _reading(url):
        return bytes(fs.cat_file(path))


def write(url: str, data: bytes) -> None:
    """Put the object whole, replacing any older one.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    _put(url, data, exclusive=False)


def create(url: str, data: bytes) -> bool:
    """Put the object whole if nothing is there; say whether it was put.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    return _put(url, data, exclusive=True)


@contextmanager
def writing(url: str, size: int) -> Iterator[IO[bytes]]:
    """A file to write piece by piece for the length of the block; the object is there, whole, only when it ends well.

    Args:
        url: where to put it, in the place of any older object.
        size: bytes that will be written, to name where they do not fit.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    local = local_path(url)
    try:
        with _placed(local, exclusive=False) if local else _uploaded(url) as file:
            yield file
    except OSError as error:
        raise _full(url, size, error) from error


def names(url: str) -> list[str]:
    """The sorted names of the objects and folders right below a folder; empty when it is absent.

    Raises:
        StorageError: the store does not say.
    """
    fs, path = filesystem(url)
    try:
        with _explained(url, "listed"):
            return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False))
    except FileNotFoundError:
        return []


def remove_tree(url: str) -> None:
    """Remove an object, or a folder and all below it, if it is there.

    Raises:
        StorageError: the store refuses.
    """
    fs, path = filesystem(url)
    with _explained(url, "removed"):
        if fs.exists(path):
            fs.rm(path, recursive=True)


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """Every error of the block as a `StorageError`, of an absent object too."""
    try:
        with _explained(url, "read"):
            yield
    except FileNotFoundError as error:
        raise StorageError(f"{redact(url)}: no such object") from error


@contextmanager
def _explained(url: str, done: str) -> Iterator[None]:
    """Every error of the block but an absent or present object's as a `StorageError`."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, DitflowError):
        raise
    except Exception as error:  # stores raise kinds of their own when they are away or refuse
        raise StorageError(f"{redact(url)}: cannot be {done} ({error})") from error


def _put(url: str, data: bytes, *, exclusive: bool) -> bool:
    local = local_path(url)
    try:
        if local is not None:
            return _put_local(local, data, exclusive=exclusive)
        fs, path = filesystem(url)
        with _explained(url, "written"):
            fs.pipe_file(path, data, mode="create" if exclusive else "overwrite")
    except FileExistsError:
        return False
    except OSError as error:
        raise _full(url, len(data), error) from error
    return True


def _put_local(path: Path, data: bytes, *, exclusive: bool) -> bool:
    with _placed(path, exclusive=exclusive) as file:
        file.write(data)
    return True


@contextmanager
def _placed(path: Path, *, exclusive: bool) -> Iterator[IO[bytes]]:
    """A temporary file that takes its place when the block ends well, and is gone otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(temporary, path)  # fails when the name is taken, unlike a rename
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _uploaded(url: str) -> Iterator[IO[bytes]]:
    """An upload that is completed when the block ends well, and dropped otherwise."""
    fs, path = filesystem(url)
    with _explained(url, "written"):
        file = fs.open(path, "wb", autocommit=False)
        try:
            with file:
                yield file
        except BaseException:
            file.discard()
            raise
        file.commit()


def _full(url: str, count: int, error: OSError) -> StorageError:
    if error.errno not in _FULL:
        return StorageError(f"{redact(url)}: cannot be written ({error})")
    local = local_path(url)
    free = ""
    if local is not None:
        folder = next(parent for parent in local.parents if parent.exists())
        free = f", {shutil.disk_usage(folder).free:,} bytes are free"
    return StorageError(
        f"{redact(url)}: the disk is full ({count:,} bytes to write{free}); make room and run the same command again"
    )
