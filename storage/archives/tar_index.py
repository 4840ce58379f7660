"""The entries of tars, read by byte ranges. To open a tar is to read its headers, each by a small range."""

import re
import tarfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import IO, NamedTuple, cast

import fsspec

from storage import uri
from storage.archives.account import SPECIAL, Account
from storage.archives.listing import first_line, inside_path
from storage.archives.ranges import Read, reader
from storage.errors import InputError
from storage.magic import stand_in
from storage.parallel import threads

_BLOCK = 512
_RANGE = 4 * _BLOCK  # bytes: a header, the data of a small label, and the next header
_MAX_HEADER = 1 << 20  # bytes of a long name or a table of attributes
_MAX_LABEL = 256  # bytes
_PIECE = 1 << 16  # bytes that are read at once after the end of a tar
_SPECIAL = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"V")  # V: the name of a volume
_LISTED_FOLDER = b"D"  # a folder with the list of its files, in an incremental archive of GNU tar
_READERS = 16  # threads
_PLAIN = re.compile(
    rb"(.{100})[0-7 \0]{24}([0-7]{11})[ \0][0-7 \0]{12}([0-7]{6})([ \0]{2})0.{100}ustar.{67}[0-7 \0]{16}\0.{166}",
    re.DOTALL,
)
"""The header of a file as nearly all are, which has its whole name: name, size, checksum and what ends it."""


class Span(NamedTuple):
    """A byte range of an object."""

    path: str
    start: int
    size: int


class Entry(NamedTuple):
    """A file in a tar."""

    name: str
    span: Span
    text: bytes
    """The contents of a ``.cls`` file; empty for all others."""


class Tar(NamedTuple):
    """A tar, which may itself be inside a tar."""

    name: str
    """Name of the file without folder and ``.tar``."""
    where: str
    """URL of the tar, for errors."""
    entries: list[Entry]
    """The visible files, in their order."""
    folders: list[str]
    """Paths of the visible folders that have entries of their own."""
    account: Account
    """What was passed over in it."""


def span_reader(fs: fsspec.AbstractFileSystem) -> Callable[[Span], bytes]:
    """A function that returns the bytes of a span."""
    read = reader(fs)
    return lambda span: read(span.path, span.start, span.size) if span.size else b""


def list_tars(fs: fsspec.AbstractFileSystem, urls: list[str]) -> tuple[tuple[Tar, ...], str]:
    """The tars at the URLs, and a stamp that changes when one of them changes: what the store says of them.

    Raises:
        InputError: a tar is missing, or as `index`.
    """
    spans, stamps = [], []
    for where, path in [(uri.redact(url), uri.filesystem(url)[1]) for url in urls]:
        try:
            info = fs.info(path)
            spans.append((where, Span(path, 0, int(info["size"]))))
        except (OSError, TypeError) as error:
            raise InputError(f"{where}: no such file ({first_line(error)})") from error
        stamps.append(str(info))
    stamp = "".join(stamps)
    return indexed(fs, tuple(spans), stamp), stamp


@lru_cache(maxsize=4)  # a million headers take minutes, and a run opens its archive more than once
def indexed(fs: fsspec.AbstractFileSystem, spans: tuple[tuple[str, Span], ...], stamp: str) -> tuple[Tar, ...]:
    """The tars in spans, each given with its URL; another stamp makes them be read again."""
    read = reader(fs)
    with threads(_READERS) as pool:
        return tuple(pool.map(lambda item: index(read, *item), spans))


def index(read: Read, where: str, span: Span) -> Tar:
    """The files of a tar, in its order.

    Args:
        read: reads the object that holds the tar.
        where: URL of the tar, for errors.
        span: the tar's bytes in the object.

    Raises:
        InputError: the tar is damaged, is something else or holds links; the line names the byte.
    """
    headers, end = _Headers(read, span), 0
    found = Tar(where.rpartition("/")[2].removesuffix(".tar"), where, [], [], Account(where))
    try:
        if (instead := stand_in(headers.read(_BLOCK))) is not None:
            raise InputError(f"{where}: {instead}")
        headers.seek(0)
        for stop in _added(found, span, headers):
            end = stop
        headers.seek(end)
        if headers.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("no end-of-archive mark")
        _check_rest(where, headers, span)
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        damage = f"damaged or not a tar, from byte {span.start + end:,} on ({first_line(error)})"
        raise InputError(f"{where}: {damage}; fetch or pack it again") from error
    return found


def _check_rest(where: str, headers: "_Headers", span: Span) -> None:
    """Check that there are only zeros after the end of a tar.

    Raises:
        InputError: there is something else, such as another tar.
    """
    end = headers.tell() - _BLOCK
    while data := headers.read(_PIECE):
        if any(data):
            text = f"there are bytes after its end at byte {span.start + end:,}, as if tars were joined by cat"
            raise InputError(f"{where}: {text}; keep them apart, or join them with `tar --concatenate`")


def _added(tar: Tar, whole: Span, headers: "_Headers") -> Iterator[int]:
    """Add the entries of a tar, and yield the byte after each. `tarfile` reads the headers that are not plain."""
    end, header = 0, headers.read(_BLOCK)
    while header != bytes(_BLOCK):
        plain = _PLAIN.fullmatch(header)
        if plain and int(plain[3], 8) == sum(header) - sum(plain[3] + plain[4]) + 8 * ord(" "):
            name, size = plain[1].partition(b"\0")[0].decode(tarfile.ENCODING, "surrogateescape"), int(plain[2], 8)
            _add_file(tar, whole, name, end + _BLOCK, size, headers)
            end += _BLOCK - -size // _BLOCK * _BLOCK
            yield end
        else:
            headers.seek(end)
            with tarfile.open(fileobj=cast(IO[bytes], headers), mode="r:") as rest:  # calls read, seek and tell
                while (info := rest.next()) is not None:
                    if rest.offset <= end:
                        raise tarfile.HeaderError("a header points backwards")
                    end = rest.offset
                    _add(tar, whole, info, headers)
                    yield end
                    if not rest.pax_headers:  # nothing that holds for all further entries
                        break
                else:
                    return
        headers.seek(end)
        header = headers.read(_BLOCK)


def _add(tar: Tar, whole: Span, info: tarfile.TarInfo, headers: "_Headers") -> None:
    """Add the entry of a header to those of its tar."""
    if info.isreg() and not info.issparse():
        _add_file(tar, whole, info.name, info.offset_data, info.size, headers)
        return
    name = inside_path(tar.where, info.name)
    if not name or not tar.account.sees(name):
        return
    if info.type in (tarfile.DIRTYPE, _LISTED_FOLDER):
        tar.folders.append(name)
    elif info.type in _SPECIAL:
        tar.account.pass_over(SPECIAL, name)
    else:
        problem = (
            "is a link, a sparse file or a part of one; pack it again with plain files (tar -h --hard-dereference)"
        )
        raise InputError(f"{tar.where}: {info.name!a} {problem}")


def _add_file(tar: Tar, whole: Span, path: str, start: int, size: int, headers: "_Headers") -> None:
    """Add a file, given the place of its bytes in its tar."""
    name = inside_path(tar.where, path)
    if name and tar.account.sees(name):
        text = _label(tar, name, start, size, headers) if name.endswith(".cls") else b""
        tar.entries.append(Entry(name, Span(whole.path, whole.start + start, size), text))


def _label(tar: Tar, name: str, start: int, size: int, headers: "_Headers") -> bytes:
    if size > _MAX_LABEL:
        raise tar.account.refused(name, f"a label of {size:,} bytes; a label is a number or a name")
    headers.seek(start)
    return headers.read(size)


class _Headers:
    """A file object for `tarfile`, which reads headers only. Its bytes are fetched in small ranges."""

    def __init__(self, read: Read, span: Span) -> None:
        self._read, self._span = read, span
        self._position = 0
        self._buffer_start, self._buffer = 0, b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < 0:
            raise ValueError(f"a header points to byte {position}")
        self._position = position

    def read(self, count: int) -> bytes:
        if count > _MAX_HEADER:
            raise ValueError(f"a header of {count:,} bytes")
        stop = min(self._position + count, self._span.size)
        if not self._buffer_start <= self._position <= stop <= self._buffer_start + len(self._buffer):
            self._fill(max(_RANGE, count))
        data = self._buffer[self._position - self._buffer_start : stop - self._buffer_start]
        self._position += len(data)
        return data

    def _fill(self, count: int) -> None:
        self._buffer_start, self._buffer = self._position, b""
        size = min(count, self._span.size - self._position)
        if size > 0:
            self._buffer = self._read(self._span.path, self._span.start + self._position, size)
            if len(self._buffer) != size:
                raise ValueError(f"the store returned {len(self._buffer):,} bytes for a range of {size:,}")
