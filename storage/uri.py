"""Objects by URL on any fsspec file system: reads, atomic writes, listings.

A URL without ``://`` is a local path, whatever characters it has. A local write goes to a temporary file, which is
synced and then renamed, so an object is either absent or complete. Object stores guarantee this by themselves. Every
error of a store becomes one line that names the object.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage import magic
from storage.errors import DitflowError, InputError, StorageError
from storage.local_file import local_file
from storage.patience import PatientStore
from storage.url import chain as chain
from storage.url import checked as checked
from storage.url import join as join
from storage.url import name as name
from storage.url import parent as parent
from storage.url import printable as printable
from storage.url import redact as redact
from storage.url import redact_json as redact_json

_VERSION_KEYS = ("mtime", "created", "ino", "ETag", "etag", "LastModified", "last_modified", "md5Hash", "generation")
MAX_TEXT = 2**26
"""Most bytes of a JSON file that someone else may have written."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256(data: bytes) -> str:
    """SHA-256 of the bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(url: str) -> str:
    """SHA-256 of an object, 64 hex digits. The object is read in pieces, so it may be larger than the memory.

    Raises:
        StorageError: the object is absent or cannot be read.
    """
    fs, path = filesystem(url)
    digest = hashlib.sha256()
    with _reading(url), fs.open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path in it.

    Listings are not cached, since other processes write to the same folders. A remote store is asked again while it
    does not answer, as `storage.patience` says.

    Raises:
        InputError: the scheme is unknown, its package is not installed, or `checked` refuses the URL.
    """
    try:
        if "://" not in checked(url):
            path = Path.cwd() / (Path(url).expanduser() if url.startswith("~") else url)
            return LocalFileSystem(use_listings_cache=False), str(path)
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        return fs if isinstance(fs, LocalFileSystem) else PatientStore(fs), str(path)
    except (ValueError, RuntimeError, ImportError, OSError) as error:  # RuntimeError: no such user
        raise InputError(f"{printable(redact(url))}: not a usable URL ({error})") from error


def absolute(url: str) -> str:
    """The absolute form of a local path; any other URL is returned unchanged."""
    path = local_path(url)
    return url if path is None else str(path)


def local_path(url: str) -> Path | None:
    """The path of a local URL; None for a URL of any other file system."""
    fs, path = filesystem(url)
    return Path(path) if isinstance(fs, LocalFileSystem) else None


def exists(url: str) -> bool:
    """Whether an object or folder exists.

    Raises:
        StorageError: the store does not answer.
    """
    fs, path = filesystem(url)
    with _reading(url):
        return bool(fs.exists(path))


def size(url: str) -> int | None:
    """The object's size in bytes; None if it is absent.

    Raises:
        StorageError: the store does not answer.
    """
    fs, path = filesystem(url)
    try:
        with _explained(url, "read"):
            return int(fs.info(path)["size"])
    except FileNotFoundError:
        return None


def is_folder(url: str) -> bool:
    """Whether this is a folder, not an object and not absent.

    Raises:
        StorageError: the store does not answer.
    """
    fs, path = filesystem(url)
    try:
        with _explained(url, "read"):
            return bool(fs.info(path)["type"] == "directory")
    except FileNotFoundError:
        return False


def version(url: str) -> dict[str, str] | None:
    """Properties that change when an object is written again: its size, and times, inode or ETag; None if absent.

    Empty if the store gives neither times nor an ETag.

    Raises:
        StorageError: the store does not answer.
    """
    fs, path = filesystem(url)
    try:
        with _explained(url, "read"):
            info = fs.info(path)
    except FileNotFoundError:
        return None
    properties = {key: str(info[key]) for key in _VERSION_KEYS if info.get(key)}
    return properties | {"size": str(info["size"])} if properties else {}


def read_ranges(urls: Sequence[str], starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
    """Byte ranges of objects of one store, requested concurrently where the store can.

    Args:
        urls: the object of each range.
        starts: the first byte of each range.
        stops: the byte after the last one of each range.

    Raises:
        StorageError: an object is absent, too short or cannot be read; the line names the first one.
    """
    fs, _ = filesystem(urls[0])
    paths = [filesystem(url)[1] for url in urls]
    with _explained(urls[0], "read"):
        results = fs.cat_ranges(paths, list(starts), list(stops))
    for url, start, stop, result in zip(urls, starts, stops, results, strict=True):
        reason = result if isinstance(result, Exception) else f"only {len(result):,} bytes"
        if isinstance(result, Exception) or len(result) != stop - start:
            raise StorageError(f"{redact(url)}: bytes {start:,} to {stop:,} cannot be read ({reason})")
    return [bytes(data) for data in results]


def read(url: str, most: int | None = None) -> bytes:
    """The bytes of an object.

    Args:
        url: the object.
        most: bytes that it may have; a larger one is not read. None: any number.

    Raises:
        StorageError: the object is absent, too large or cannot be read.
    """
    if most is not None and (count := size(url) or 0) > most:
        raise StorageError(f"{redact(url)}: has {count:,} bytes, more than the {most:,} that such a file may have")
    fs, path = filesystem(url)
    with _reading(url):
        return bytes(fs.cat_file(path))


def read_if_there(url: str) -> bytes | None:
    """The bytes of an object; None if it is absent.

    Raises:
        StorageError: it cannot be read.
    """
    fs, path = filesystem(url)
    try:
        with _explained(url, "read"):
            return bytes(fs.cat_file(path))
    except FileNotFoundError:
        return None


def stand_in(url: str) -> str | None:
    """What lies in the place of a file that was not fetched, as `magic.stand_in`; None also if it cannot be read."""
    fs, path = filesystem(url)
    try:
        return magic.stand_in(fs.cat_file(path, start=0, end=magic.HEAD))
    except Exception:  # each store raises its own types; who reads the file itself reports them
        return None


def write(url: str, data: bytes) -> None:
    """Write an object atomically, replacing any older one.

    Raises:
        StorageError: the disk is full or the store refuses.

    Examples:
        >>> write("memory://notes/a.txt", b"an object")
        >>> read("memory://notes/a.txt")
        b'an object'
    """
    _put(url, data, exclusive=False)


def create(url: str, data: bytes) -> bool:
    """Write an object atomically if none exists; return whether the object holds these bytes now.

    So it does not matter whether a store that lost its answer to us, and was asked again, has written them before.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    return _put(url, data, exclusive=True) or read(url) == data


@contextmanager
def writing(url: str, size: int) -> Iterator[IO[bytes]]:
    """A file to write in pieces; the object appears, complete, when the block ends without an error.

    Args:
        url: the object; any older one is replaced.
        size: bytes that will be written, for the error if the disk is full.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    local = local_path(url)
    try:
        with local_file(local, exclusive=False) if local else _upload(url) as file:
            yield file
    except OSError as error:
        raise _write_error(url, size, error) from error


def names(url: str) -> list[str]:
    """The sorted names of the objects and folders directly below a folder; empty if the folder is absent.

    Raises:
        StorageError: the store does not answer.
    """
    fs, path = filesystem(url)
    try:
        with _explained(url, "listed"):
            return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False))
    except FileNotFoundError:
        return []


def tree(url: str) -> list[str]:
    """The sorted paths of all files below a folder, without following symbolic links; empty if it is absent.

    Raises:
        StorageError: the store does not answer.
    """
    fs, path = filesystem(url)
    with _explained(url, "listed"):
        below = path.rstrip("/") + "/"
        return sorted(str(file)[len(below) :] for file in fs.find(path) if str(file).startswith(below))


def infos(url: str) -> dict[str, dict[str, Any]]:
    """What a store says of each file below a folder, by its path there: ``size``, and times under names of its own.

    Raises:
        StorageError: the store does not answer.
    """
    fs, path = filesystem(url)
    with _explained(url, "listed"):
        below = path.rstrip("/") + "/"
        found = fs.find(path, detail=True).items()
        return {str(file)[len(below) :]: info for file, info in found if str(file).startswith(below)}


def remove_tree(url: str, within: str) -> None:
    """Remove an object, or a folder with all below it, if it exists. Symbolic links are never followed.

    Args:
        url: the object or folder.
        within: a folder above it.

    Raises:
        StorageError: the store refuses, or a symbolic link lies between the two.
    """
    check_no_link(url, within)
    fs, path = filesystem(url)
    with _explained(url, "removed"):
        if isinstance(fs, LocalFileSystem):
            if os.path.lexists(path):
                with suppress(FileNotFoundError):  # another process removes it, too, and goes on
                    fs.rm(path, recursive=True)
            return
        for file in fs.find(path):  # not by a recursive rm, to which * and [ in a name are a pattern
            with suppress(FileNotFoundError):  # removed by a call whose answer was lost
                fs.rm_file(file)


def move(url: str, to: str) -> None:
    """Move an object within its store, which takes no room on a disk; one of the new name is replaced.

    Raises:
        StorageError: the store refuses.
    """
    old, new = local_path(url), local_path(to)
    with _explained(url, "moved"):
        if old is not None and new is not None:
            old.replace(new)
        else:
            write(to, read(url))
            fs, path = filesystem(url)
            fs.rm_file(path)


def check_no_link(url: str, within: str) -> None:
    """Refuse an object that is reached through a symbolic link below a folder.

    Raises:
        StorageError: there is such a link: what it leads to may belong to someone else.
    """
    path, top = local_path(url), local_path(within)
    if path is None or top is None:
        return
    parts = path.relative_to(top).parts
    folders = (top.joinpath(*parts[:depth]) for depth in range(1, len(parts)))
    link = next(filter(Path.is_symlink, folders), None)
    if link is not None:
        raise StorageError(f"{link}: a symbolic link to {link.resolve()}, and nothing is removed through links")


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """Turn every error of the block into a `StorageError`, including that of an absent object."""
    try:
        with _explained(url, "read"):
            yield
    except FileNotFoundError as error:
        raise StorageError(f"{redact(url)}: no such object") from error


@contextmanager
def _explained(url: str, done: str) -> Iterator[None]:
    """Turn the errors of the block into a `StorageError`, but for those of an absent or an existing object.

    Args:
        url: the object.
        done: what cannot be done with it, as a past participle such as ``read``.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, DitflowError):
        raise
    except Exception as error:  # each store raises its own types when it is down or refuses
        raise StorageError(f"{redact(url)}: cannot be {done} ({error})") from error


def _put(url: str, data: bytes, *, exclusive: bool) -> bool:
    local = local_path(url)
    try:
        if local is not None:
            with local_file(local, exclusive=exclusive) as file:
                file.write(data)
            return True
        fs, path = filesystem(url)
        with _explained(url, "written"):
            fs.pipe_file(path, data, mode="create" if exclusive else "overwrite")
    except FileExistsError:
        return False
    except OSError as error:
        raise _write_error(url, len(data), error) from error
    return True


@contextmanager
def _upload(url: str) -> Iterator[IO[bytes]]:
    """An upload that is committed if the block ends without an error, and discarded otherwise."""
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


def _write_error(url: str, count: int, error: OSError) -> StorageError:
    if error.errno not in _DISK_FULL:
        return StorageError(f"{redact(url)}: cannot be written ({error})")
    local = local_path(url)
    free = ""
    if local is not None:
        folder = next(parent for parent in local.parents if parent.exists())
        free = f", {shutil.disk_usage(folder).free:,} bytes are free"
    return StorageError(
        f"{redact(url)}: the disk is full ({count:,} bytes to write{free}); make room and run the same command again"
    )
