"""A zip of class folders. Its central directory is read once, and then each file by one range."""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import fsspec

from storage import uri
from storage.archives.listing import MAX_BYTES, Archive, ListedFile, first_line, path_parts
from storage.errors import InputError

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # signature, ..., lengths of name and extra field
_SIGNATURE = b"PK\x03\x04"


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
    """A zip of class folders, at its top or below the folder of a URL ``zip://folder::url``.

    Files may be stored or deflated. Files outside the class folders and hidden files are skipped.

    Raises:
        InputError: the zip is damaged, encrypted or compressed by another method, has unsafe file names,
            or files that overlap or are too large, or as `Archive`.
    """
    inside, _, outer = url.rpartition("::")
    fs, path = uri.filesystem(outer)
    where = uri.redact(outer)
    top = path_parts(where, inside.removeprefix("zip://").lstrip("/"))
    try:
        with fs.open(path, "rb") as file, zipfile.ZipFile(file) as zip_file:
            infos, directory = zip_file.infolist(), zip_file.start_dir
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file") from error
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        damage = f"damaged or not a zip ({first_line(error)}); fetch or pack it again"
        raise InputError(f"{where}: {uri.stand_in(outer) or damage}") from error
    files = _listed(where, infos, directory, top)
    return Archive(where, files, lambda location: _fetch(fs, path, location), class_names)


def _listed(where: str, infos: list[zipfile.ZipInfo], directory: int, top: list[str]) -> Iterator[ListedFile]:
    """The files of class folders below the folder `top`; `directory` is the first byte of the central directory."""
    infos = sorted(infos, key=lambda info: info.header_offset)
    stops = [*(info.header_offset for info in infos[1:]), directory]
    for info, stop in zip(infos, stops, strict=True):
        parts = path_parts(where, info.filename)
        if info.is_dir() or parts[: len(top)] != top or len(parts) < len(top) + 2:
            continue
        _check(f"{where}/{info.filename}", info, stop)
        location = _Location(
            info.header_offset,
            stop,
            info.compress_size,
            info.file_size,
            info.CRC,
            info.compress_type == zipfile.ZIP_STORED,
        )
        yield ListedFile(parts[len(top)], "/".join(parts[len(top) + 1 :]), info.file_size, location)


def _check(where: str, info: zipfile.ZipInfo, stop: int) -> None:
    if info.flag_bits & 1:
        raise InputError(f"{where}: encrypted; pack the zip again without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{where}: compression method {info.compress_type}; pack the zip again, stored or deflated")
    if info.header_offset + _LOCAL_HEADER.size + info.compress_size > stop:
        raise InputError(f"{where}: overlaps the next file, so the zip is damaged; fetch or pack it again")
    if stop - info.header_offset > 2 * MAX_BYTES:
        raise InputError(f"{where}: {stop - info.header_offset:,} bytes up to the next file; pack the zip again")


def _fetch(fs: fsspec.AbstractFileSystem, path: str, location: _Location) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: the file does not match the central directory.
    """
    raw = fs.cat_file(path, start=location.start, end=location.stop)
    if len(raw) < _LOCAL_HEADER.size or raw[:4] != _SIGNATURE:
        raise ValueError(f"no file begins at byte {location.start:,}")
    *_, name, extra = _LOCAL_HEADER.unpack_from(raw)
    data = raw[_LOCAL_HEADER.size + name + extra :][: location.compressed]
    if not location.is_stored:
        data = _inflated(data, location)
    if len(data) != location.size or zlib.crc32(data) != location.crc:
        raise ValueError(f"damaged from byte {location.start:,} on: size or checksum differs from the listed one")
    return bytes(data)


def _inflated(data: bytes, location: _Location) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, location.size + 1)  # never more than listed
    except zlib.error as error:
        raise ValueError(f"damaged from byte {location.start:,} on: {error}") from error
