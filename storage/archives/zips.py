"""A zip of class folders. Its central directory is read once, and then each file by one range."""

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, NamedTuple

from storage import uri
from storage.archives.account import Account
from storage.archives.classes import Found, class_folders
from storage.archives.listing import MAX_BYTES, Archive, first_line, inside_path
from storage.archives.ranges import reader
from storage.errors import InputError

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # signature, ..., lengths of name and extra field
_SIGNATURE = b"PK\x03\x04"
_END = b"PK\x05\x06"  # of the record at the end of a zip
_MAX_END = 22 + (1 << 16)  # bytes of that record with its comment
_END_64 = b"PK\x06\x06"  # of the same record for more files, before the other
_MAX_END_64 = 56 + 20  # bytes of that record and of its address
_IN_64 = 0xFFFF  # the number of files stands there
_UNIX = 3  # the system that an entry's attributes are of


class _Location(NamedTuple):
    """The bytes of a file: local header, name, extra field, data."""

    start: int
    stop: int
    """First byte of what follows."""
    compressed: int
    """Bytes of the data, compressed."""
    size: int
    crc: int
    is_stored: bool
    """Whether the data is not compressed."""


def open_zip(url: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """A zip of class folders, by the rules of `class_folders`. Its files may be stored or deflated.

    With a URL ``zip://folder::url`` the archive is the folder, and the rest of the zip is not looked at.

    Raises:
        InputError: the zip is damaged, encrypted or compressed by another method, has unsafe file names, links,
            files that overlap or are too large, or another zip in front, or as `class_folders` or `Archive`.
    """
    inside, outer = uri.chain(url)
    fs, path = uri.filesystem(outer)
    where = uri.redact(outer)
    top = inside_path(where, inside.removeprefix("zip://").lstrip("/"))
    try:
        with fs.open(path, "rb") as file, zipfile.ZipFile(file) as zip_file:
            infos, directory = zip_file.infolist(), zip_file.start_dir
            _check_front(where, file, min((info.header_offset for info in infos), default=0))
            _check_count(file, len(infos))
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file") from error
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        damage = f"damaged or not a zip ({first_line(error)}); fetch or pack it again"
        raise InputError(f"{where}: {uri.stand_in(outer) or damage}") from error
    account = Account(f"{where}/{top}".rstrip("/"))
    files = list(_found(account, infos, directory, f"{top}/" if top else ""))
    folders = [found.path for found in files if found.location is None]
    images = class_folders(account, [found for found in files if found.location is not None], folders, class_names)
    read = partial(reader(fs), path)
    return Archive(account, images, partial(_fetch, read), class_names)


def _found(account: Account, infos: list[zipfile.ZipInfo], directory: int, top: str) -> Iterator[Found]:
    """The visible files and folders below the folder `top`; a folder has no location.

    Args:
        account: counts what is passed over.
        infos: all entries.
        directory: first byte of the central directory.
        top: a folder with a slash at its end, or empty.
    """
    infos = sorted(infos, key=lambda info: info.header_offset)
    stops = [*(info.header_offset for info in infos[1:]), directory]
    for info, stop in zip(infos, stops, strict=True):
        path = inside_path(account.where, info.filename)
        inside = path.removeprefix(top)
        if not path.startswith(top) or not inside or not account.sees(inside):
            continue
        if info.is_dir():
            yield Found(inside, 0, None)
            continue
        _check(account, inside, info, stop)
        location = _Location(
            info.header_offset,
            stop,
            info.compress_size,
            info.file_size,
            info.CRC,
            info.compress_type == zipfile.ZIP_STORED,
        )
        yield Found(inside, info.file_size, location)


def _check_front(where: str, file: IO[bytes], first: int) -> None:
    """Check that no other zip ends before the first file, as when two are joined by ``cat``.

    Raises:
        InputError: one does.
    """
    file.seek(max(0, first - _MAX_END))
    if _END in file.read(min(first, _MAX_END)):
        raise InputError(
            f"{where}: another zip lies in front, as if two were joined; keep them apart, or pack them again"
        )


def _check_count(file: IO[bytes], found: int) -> None:
    """Check that the central directory has as many entries as the record at its end says; `zipfile` does not.

    Raises:
        BadZipFile: it has not.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _MAX_END - _MAX_END_64))
    tail = file.read()
    end = tail.rindex(_END)
    (listed,) = struct.unpack_from("<H", tail, end + 10)
    end_64 = tail.rfind(_END_64, 0, end)
    if listed == _IN_64 and end_64 >= 0:
        (listed,) = struct.unpack_from("<Q", tail, end_64 + 32)
    elif listed == found % (_IN_64 + 1):  # old tools write more files without the larger record
        return
    if listed != found:
        raise zipfile.BadZipFile(f"{found:,} files in its directory instead of {listed:,}")


def _check(account: Account, path: str, info: zipfile.ZipInfo, stop: int) -> None:
    if info.create_system == _UNIX and stat.S_ISLNK(info.external_attr >> 16):
        raise account.refused(path, "a link; pack the zip again with the files that links lead to")
    if info.flag_bits & 1:
        raise account.refused(path, "encrypted; pack the zip again without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        problem = f"compression method {info.compress_type}; pack the zip again, stored or deflated"
        raise account.refused(path, problem)
    if info.header_offset + _LOCAL_HEADER.size + info.compress_size > stop:
        raise account.refused(path, "overlaps the next file, so the zip is damaged; fetch or pack it again")
    if stop - info.header_offset > 2 * MAX_BYTES:
        problem = f"{stop - info.header_offset:,} bytes up to the next file; pack the zip again"
        raise account.refused(path, problem)


def _fetch(read: Callable[[int, int], bytes], location: _Location) -> bytes:
    """The bytes of a file, given a function that reads a number of bytes of the zip from some byte on.

    Raises:
        ValueError: the file does not match the central directory.
    """
    raw = read(location.start, location.stop - location.start)
    if len(raw) < _LOCAL_HEADER.size or raw[:4] != _SIGNATURE:
        raise ValueError(f"no file begins at byte {location.start:,}")
    *_, name, extra = _LOCAL_HEADER.unpack_from(raw)
    data = raw[_LOCAL_HEADER.size + name + extra :][: location.compressed]
    if not location.is_stored:
        data = _inflated(data, location)
    if len(data) != location.size or zlib.crc32(data) != location.crc:
        raise ValueError(f"damaged from byte {location.start:,} on: size or checksum differs from the listed one")
    return data


def _inflated(data: bytes, location: _Location) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, location.size + 1)  # never more than listed
    except zlib.error as error:
        raise ValueError(f"damaged from byte {location.start:,} on: {error}") from error
