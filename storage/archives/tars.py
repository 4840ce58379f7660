"""Tars of class tars, of webdataset samples or of class folders, read by byte ranges.

To open a tar is to read its headers, each by a small range; to read an image is one range of the
outermost file. Labels are read as text; nothing is unpickled.
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import IO, NamedTuple, TypeAlias, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage import uri
from storage.archives.listing import Archive, ListedFile, class_names_of, first_line, path_parts
from storage.errors import InputError
from storage.magic import stand_in
from storage.parallel import threads

_BLOCK = 512
_RANGE = 4 * _BLOCK  # bytes: a header, the data of a small label, and the next header
_MAX_HEADER = 1 << 20  # bytes of a long name or a table of attributes
_MAX_LABEL = 256  # bytes
_READERS = 16  # threads
_OPEN_FILES = 64  # local files that are kept open
_IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"})
_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)

Read: TypeAlias = Callable[[str, int, int], bytes]
"""Returns bytes of an object, given its path, the first byte and their number."""


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


def open_tar(url: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """One tar of class tars, of webdataset samples or of class folders. The type is detected from its contents.

    Raises:
        InputError: the tar is damaged or of none of these types, or as `Archive`.
    """
    fs, _ = uri.filesystem(url)
    where = uri.redact(url)
    (outer,), stamp = list_tars(fs, [url])
    inner = [(f"{where}/{entry.name}", entry.span) for entry in outer.entries if entry.name.endswith(".tar")]
    if inner:
        files = _class_tars(_indexed(fs, tuple(inner), stamp))
    elif _has_labels(outer):
        files = _samples([outer], class_names)
    else:
        files = _class_folders(outer)
    return Archive(where, files, span_reader(fs), class_names)


def open_tars(urls: list[str], where: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """Several tars as one archive: of webdataset samples if they hold labels, one for each class otherwise.

    Raises:
        InputError: as `open_tar`.
    """
    fs, _ = uri.filesystem(urls[0])
    tars, _ = list_tars(fs, urls)
    files = _samples(tars, class_names) if any(map(_has_labels, tars)) else _class_tars(tars)
    return Archive(where, files, span_reader(fs), class_names)


def _class_tars(tars: Iterable[Tar]) -> Iterator[ListedFile]:
    for tar in tars:
        if not tar.entries:
            raise InputError(f"{tar.where}: class tar without files; fill it or remove it")
        for entry in tar.entries:
            yield ListedFile(tar.name, entry.name, entry.span.size, entry.span)


def _class_folders(tar: Tar) -> Iterator[ListedFile]:
    in_folders = [(entry.name.partition("/"), entry.span) for entry in tar.entries if "/" in entry.name]
    if not in_folders:
        types = "class tars, class folders or .cls files"
        raise InputError(f"{tar.where}: no {types} found; for held-out images alone, set archive.held_out_labels")
    for (class_name, _, path), span in in_folders:
        yield ListedFile(class_name, path, span.size, span)


def _samples(tars: Iterable[Tar], class_names: tuple[str, ...] | None) -> Iterator[ListedFile]:
    pairs = [pair for tar in tars for pair in _pairs(tar)]
    names = class_names_of({label for label, _ in pairs}, class_names)
    for label, image in pairs:
        yield ListedFile(names[label], image.name, image.span.size, image.span)


def _pairs(tar: Tar) -> Iterator[tuple[str, Entry]]:
    """Label and image of each webdataset sample, whose files have the same name up to its first dot."""
    samples: dict[str, tuple[list[str], list[Entry]]] = {}
    for entry in tar.entries:
        if (match := _SAMPLE.fullmatch(entry.name)) is None:
            continue
        labels, images = samples.setdefault(match[1], ([], []))
        if match[2] == "cls":
            labels.append(entry.text.decode("utf-8-sig", errors="replace").strip())
        elif match[2].lower() in _IMAGE_EXTENSIONS:
            images.append(entry)
    for key, (labels, images) in samples.items():
        if (labels or images) and not (len(labels) == len(images) == 1 and labels[0]):
            counts = f"{len(images)} images and {len(labels)} labels"
            raise InputError(f"{tar.where}/{key}: {counts}; a sample is one image and one .cls file with a label")
        if images:
            yield labels[0], images[0]


def _has_labels(tar: Tar) -> bool:
    return any(entry.name.endswith(".cls") for entry in tar.entries)


def span_reader(fs: fsspec.AbstractFileSystem) -> Callable[[Span], bytes]:
    """A function that returns the bytes of a span."""
    read = _reader(fs)
    return lambda span: read(span.path, span.start, span.size) if span.size else b""


def _reader(fs: fsspec.AbstractFileSystem) -> Read:
    """A function that reads a range of an object. Local files stay open, since opening takes longer than reading."""
    if not isinstance(fs, LocalFileSystem):
        return lambda path, start, size: bytes(fs.cat_file(path, start=start, end=start + size))
    opened = lru_cache(maxsize=_OPEN_FILES)(partial(open, mode="rb", buffering=0))

    def read(path: str, start: int, size: int) -> bytes:
        file = opened(path)  # this reference keeps it open if the cache drops it meanwhile
        return os.pread(file.fileno(), size, start)

    return read


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
    return _indexed(fs, tuple(spans), stamp), stamp


@lru_cache(maxsize=4)  # a million headers take minutes, and a run opens its archive more than once
def _indexed(fs: fsspec.AbstractFileSystem, spans: tuple[tuple[str, Span], ...], stamp: str) -> tuple[Tar, ...]:
    """The tars in spans, each given with its URL; another stamp makes them be read again."""
    read = _reader(fs)
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
    headers, end, entries = _Headers(read, span), 0, list[Entry]()
    try:
        if (instead := stand_in(headers.read(_BLOCK))) is not None:
            raise InputError(f"{where}: {instead}")
        headers.seek(0)
        with tarfile.open(fileobj=cast(IO[bytes], headers), mode="r:") as tar:  # calls read, seek and tell
            while (info := tar.next()) is not None:
                if tar.offset <= end:
                    raise tarfile.HeaderError("a header points backwards")
                end = tar.offset
                entries += _entries(where, span, info, headers)
        headers.seek(end)
        if headers.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("no end-of-archive mark")
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        damage = f"damaged or not a tar, from byte {span.start + end:,} on ({first_line(error)})"
        raise InputError(f"{where}: {damage}; fetch or pack it again") from error
    return Tar(where.rpartition("/")[2].removesuffix(".tar"), where, entries)


def _entries(where: str, tar: Span, info: tarfile.TarInfo, headers: "_Headers") -> Iterator[Entry]:
    """The entry of a header; none for folders, devices and hidden files."""
    name = "/".join(path_parts(where, info.name))
    if not name or not (info.isreg() or info.islnk() or info.issym()):
        return
    if not info.isreg() or info.issparse():
        raise InputError(f"{where}: {info.name!a} is a link or a sparse file; pack it again with plain files")
    text = b""
    if name.endswith(".cls"):
        if info.size > _MAX_LABEL:
            raise InputError(f"{where}/{name}: a label of {info.size:,} bytes; a label is a number or a name")
        headers.seek(info.offset_data)
        text = headers.read(info.size)
    yield Entry(name, Span(tar.path, tar.start + info.offset_data, info.size), text)


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
