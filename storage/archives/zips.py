"""A zip of class folders: its directory is read once, and then each file by its range."""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import fsspec

from storage import uri
from storage.archives.listing import MAX_BYTES, Archive, Found, first_line, path_parts
from storage.errors import InputError

_LOCAL = struct.Struct("<4s5H3I2H")  # a file's own header: signature, ..., lengths of name and extra field


class _Place(NamedTuple):
    start: int
    stop: int
    packed: int
    """Compressed bytes."""
    size: int
    crc: int
    stored: bool


def open_zip(url: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """A zip whose first folders are classes, or those below the folder of ``zip://folder::url``.

    Files may be stored or deflated. Files in no folder and hidden ones are passed over.

    Raises:
        InputError: it is not a whole zip, packed otherwise, encrypted, has names that lead out of it
            or files that overlap or are too large, or as `Archive`.
    """
    inside, _, outer = url.rpartition("::")
    fs, path = uri.filesystem(outer)
    where = uri.redact(outer)
    top = path_parts(where, inside.removeprefix("zip://").lstrip("/"))
    try:
        with fs.open(path, "rb") as file, zipfile.ZipFile(file) as packed:
            infos, directory = packed.infolist(), packed.start_dir
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file of images") from error
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise InputError(f"{where}: not a whole zip ({first_line(error)}); fetch or pack it again") from error
    found = _found(where, infos, directory, top)
    return Archive(where, found, lambda place: _fetch(fs, path, place), class_names)


def _found(where: str, infos: list[zipfile.ZipInfo], directory: int, top: list[str]) -> Iterator[Found]:
    infos = sorted(infos, key=lambda info: info.header_offset)
    stops = [*(info.header_offset for info in infos[1:]), directory]
    for info, stop in zip(infos, stops, strict=True):
        parts = path_parts(where, info.filename)
        if info.is_dir() or parts[: len(top)] != top or len(parts) < len(top) + 2:
            continue
        _check(f"{where}/{info.filename}", info, stop)
        place = _Place(
            info.header_offset,
            stop,
            info.compress_size,
            info.file_size,
            info.CRC,
            info.compress_type == zipfile.ZIP_STORED,
        )
        yield Found(parts[len(top)], "/".join(parts[len(top) + 1 :]), info.file_size, place)


def _check(where: str, info: zipfile.ZipInfo, stop: int) -> None:
    if info.flag_bits & 1:
        raise InputError(f"{where}: encrypted; pack it again without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{where}: packed by method {info.compress_type}; pack it again, stored or deflated")
    if info.header_offset + _LOCAL.size + info.compress_size > stop:
        raise InputError(f"{where}: overlaps what follows, as in no honest zip; fetch or pack it again")
    if stop - info.header_offset > 2 * MAX_BYTES:
        raise InputError(f"{where}: {stop - info.header_offset:,} bytes up to the next file; pack it again")


def _fetch(fs: fsspec.AbstractFileSystem, path: str, place: _Place) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: they are not what the directory says.
    """
    raw = fs.cat_file(path, start=place.start, end=place.stop)
    if len(raw) < _LOCAL.size or raw[:4] != b"PK\x03\x04":
        raise ValueError(f"byte {place.start:,} begins no file")
    *_, name, extra = _LOCAL.unpack_from(raw)
    packed = raw[_LOCAL.size + name + extra :][: place.packed]
    try:
        data = packed if place.stored else zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, place.size + 1)
    except zlib.error as error:
        raise ValueError(f"damaged from byte {place.start:,} on: {error}") from error
    if len(data) != place.size or zlib.crc32(data) != place.crc:
        raise ValueError(f"damaged from byte {place.start:,} on: another size or checksum than listed")
    return bytes(data)
