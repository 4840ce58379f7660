"""Tars, read by byte ranges: class tars, webdataset samples and class folders.

Opening reads the headers, each with a small range; an image is one range of the outermost file.
Labels are read as text and nothing is ever unpickled.
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
from storage.archives.listing import Archive, Found, first_line, numbered, path_parts
from storage.errors import InputError
from storage.parallel import threads

_BLOCK = 512
_PIECE = 4 * _BLOCK  # a header, what a small label says, and the header behind it
_LARGEST = 1 << 20  # bytes of a header: a name or a table of attributes
_LARGEST_LABEL = 256
_READERS = 16
_OPEN = 64  # local files
_IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"})
_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}", re.ASCII)
_MOST_TARS = 1_000_000

Read: TypeAlias = Callable[[str, int, int], bytes]
"""The bytes of an object, by its path, the first of them and how many."""


class Span(NamedTuple):
    """Bytes of an object."""

    path: str
    start: int
    size: int


class Entry(NamedTuple):
    """A file in a tar."""

    name: str
    span: Span
    text: bytes
    """The content of a ``.cls`` file; empty for all others."""


class Tar(NamedTuple):
    """A tar, perhaps inside another."""

    name: str
    """Of the file, without folder and ``.tar``."""
    where: str
    """In errors."""
    entries: list[Entry]


def open_tar(url: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """One tar: of class tars, of webdataset samples, or of class folders, told by what is in it.

    Raises:
        InputError: it is not a whole tar, is none of these, or as `Archive`.
    """
    fs, _ = uri.filesystem(url)
    where = uri.redact(url)
    (outer,), stamp = listed(fs, [url])
    inner = [(f"{where}/{entry.name}", entry.span) for entry in outer.entries if entry.name.endswith(".tar")]
    if inner:
        found = _class_tars(_indexed(fs, tuple(inner), stamp))
    elif _has_labels(outer):
        found = _samples([outer], class_names)
    else:
        found = _class_folders(outer)
    return Archive(where, found, fetch(fs), class_names)


def open_tars(urls: list[str], where: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """Several tars: of webdataset samples if there are labels in them, else one for each class.

    Raises:
        InputError: as `open_tar`.
    """
    fs, _ = uri.filesystem(urls[0])
    tars, _ = listed(fs, urls)
    found = _samples(tars, class_names) if any(map(_has_labels, tars)) else _class_tars(tars)
    return Archive(where, found, fetch(fs), class_names)


def expanded(url: str) -> list[str]:
    """The URLs that ``{000..123}`` in one stands for; the URL itself without such a part.

    Raises:
        InputError: the numbers run backwards or are too many.
    """
    match = _BRACES.search(url)
    if match is None:
        return [url]
    first, last = (int(number) for number in match.groups())
    if not 0 <= last - first < _MOST_TARS:
        raise InputError(f"{uri.redact(url)}: {match[0]} names no tars, or more than {_MOST_TARS:,}")
    head, tail, width = url[: match.start()], url[match.end() :], len(match[1])
    return [f"{head}{number:0{width}d}{tail}" for number in range(first, last + 1)]


def _class_tars(tars: Iterable[Tar]) -> Iterator[Found]:
    for tar in tars:
        if not tar.entries:
            raise InputError(f"{tar.where}: class tar without files; fill it or remove it")
        for entry in tar.entries:
            yield Found(tar.name, entry.name, entry.span.size, entry.span)


def _class_folders(tar: Tar) -> Iterator[Found]:
    inside = [(entry.name.partition("/"), entry.span) for entry in tar.entries if "/" in entry.name]
    if not inside:
        known = "class tars, class folders or .cls files"
        raise InputError(f"{tar.where}: no {known} in it; held-out images alone need archive.held_out_labels")
    for (class_name, _, path), span in inside:
        yield Found(class_name, path, span.size, span)


def _samples(tars: Iterable[Tar], class_names: tuple[str, ...] | None) -> Iterator[Found]:
    pairs = [pair for tar in tars for pair in _pairs(tar)]
    names = numbered({label for label, _ in pairs}, class_names)
    for label, image in pairs:
        yield Found(names[label], image.name, image.span.size, image.span)


def _pairs(tar: Tar) -> Iterator[tuple[str, Entry]]:
    """The label and the image of each webdataset sample: files that differ after the first dot only."""
    samples: dict[str, tuple[list[str], list[Entry]]] = {}
    for entry in tar.entries:
        if (match := _SAMPLE.fullmatch(entry.name)) is None:
            continue
        labels, images = samples.setdefault(match[1], ([], []))
        if match[2] == "cls":
            labels.append(entry.text.decode(errors="replace").strip())
        elif match[2].lower() in _IMAGES:
            images.append(entry)
    for key, (labels, images) in samples.items():
        if (labels or images) and not (len(labels) == len(images) == 1 and labels[0]):
            counts = f"{len(images)} images and {len(labels)} labels"
            raise InputError(f"{tar.where}/{key}: {counts}; a sample is one image and one .cls that is not empty")
        if images:
            yield labels[0], images[0]


def _has_labels(tar: Tar) -> bool:
    return any(entry.name.endswith(".cls") for entry in tar.entries)


def fetch(fs: fsspec.AbstractFileSystem) -> Callable[[Span], bytes]:
    """What reads the bytes of a span."""
    read = _reader(fs)
    return lambda span: read(span.path, span.start, span.size) if span.size else b""


def _reader(fs: fsspec.AbstractFileSystem) -> Read:
    """Reads so many bytes of an object from one on. Local files stay open: opening takes longer than reading."""
    if not isinstance(fs, LocalFileSystem):
        return lambda path, start, size: bytes(fs.cat_file(path, start=start, end=start + size))
    opened = lru_cache(maxsize=_OPEN)(partial(open, mode="rb", buffering=0))

    def read(path: str, start: int, size: int) -> bytes:
        file = opened(path)  # held, since it is closed when nobody holds it
        return os.pread(file.fileno(), size, start)

    return read


def listed(fs: fsspec.AbstractFileSystem, urls: list[str]) -> tuple[tuple[Tar, ...], str]:
    """The tars at the URLs, and what their store says of them, which changes when they do.

    Raises:
        InputError: one is not there, or as `index`.
    """
    places, stamps = [], []
    for where, path in [(uri.redact(url), uri.filesystem(url)[1]) for url in urls]:
        try:
            info = fs.info(path)
            places.append((where, Span(path, 0, int(info["size"]))))
        except (OSError, TypeError) as error:
            raise InputError(f"{where}: no such file of images ({first_line(error)})") from error
        stamps.append(str(info))
    stamp = "".join(stamps)
    return _indexed(fs, tuple(places), stamp), stamp


@lru_cache(maxsize=4)  # a million headers take minutes, and a run asks for a digest more than once
def _indexed(fs: fsspec.AbstractFileSystem, places: tuple[tuple[str, Span], ...], stamp: str) -> tuple[Tar, ...]:
    """The tars at the places, read again when the stamp is another."""
    read = _reader(fs)
    with threads(_READERS) as pool:
        return tuple(pool.map(lambda place: index(read, *place), places))


def index(read: Read, where: str, span: Span) -> Tar:
    """The files of a tar, in its order.

    Args:
        read: what reads the object that it lies in.
        where: the tar in errors.
        span: of the object.

    Raises:
        InputError: it is damaged or holds links; the line names the byte.
    """
    headers, end, entries = _Headers(read, span), 0, list[Entry]()
    try:
        with tarfile.open(fileobj=cast(IO[bytes], headers), mode="r:") as tar:  # it reads, seeks and tells
            while (info := tar.next()) is not None:
                if tar.offset <= end:
                    raise tarfile.HeaderError("a header that leads back")
                end = tar.offset
                entries += _entries(where, span, info, headers)
        headers.seek(end)
        if headers.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("no mark of the end")
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        text = f"not a whole tar, from byte {span.start + end:,} on ({first_line(error)})"
        raise InputError(f"{where}: {text}; fetch or pack it again") from error
    return Tar(where.rpartition("/")[2].removesuffix(".tar"), where, entries)


def _entries(where: str, tar: Span, info: tarfile.TarInfo, headers: "_Headers") -> Iterator[Entry]:
    """The entry of a header, or nothing for folders, devices and hidden names."""
    name = "/".join(path_parts(where, info.name))
    if not name or not (info.isreg() or info.islnk() or info.issym()):
        return
    if not info.isreg() or info.issparse():
        raise InputError(f"{where}: {info.name!a} is a link or a sparse file; pack it again with plain files")
    text = b""
    if name.endswith(".cls"):
        if info.size > _LARGEST_LABEL:
            raise InputError(f"{where}/{name}: a label of {info.size:,} bytes; it is a number or a name")
        headers.seek(info.offset_data)
        text = headers.read(info.size)
    yield Entry(name, Span(tar.path, tar.start + info.offset_data, info.size), text)


class _Headers:
    """A tar as `tarfile` wants it, fetched in small ranges, which only its headers need."""

    def __init__(self, read: Read, span: Span) -> None:
        self._read, self._span = read, span
        self._at, self._first, self._piece = 0, 0, b""

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        if position < 0:
            raise ValueError(f"a header points to byte {position}")
        self._at = position

    def read(self, count: int) -> bytes:
        if count > _LARGEST:
            raise ValueError(f"a header of {count:,} bytes")
        last = min(self._at + count, self._span.size)
        if not self._first <= self._at <= last <= self._first + len(self._piece):
            self._fill(max(_PIECE, count))
        data = self._piece[self._at - self._first : last - self._first]
        self._at += len(data)
        return data

    def _fill(self, count: int) -> None:
        self._first, self._piece = self._at, b""
        size = min(count, self._span.size - self._at)
        if size > 0:
            self._piece = self._read(self._span.path, self._span.start + self._at, size)
            if len(self._piece) != size:
                raise ValueError(f"{len(self._piece):,} bytes came for a range of {size:,}")
