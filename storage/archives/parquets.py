"""Parquet as Hugging Face datasets write it: a column of encoded images and one of labels.

A footer tells neither the size nor the place of an image. So the size of a row group stands for those
of its images in the digest, and an image costs the reading of its group, of which the last are kept.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator
from threading import Lock
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from storage import uri
from storage.archives.listing import Archive, Found, first_line, numbered
from storage.errors import InputError

MAX_GROUP = 1 << 31
"""Bytes of images that one row group may have, unpacked."""

MAX_ROWS = 1 << 20
"""Rows that one row group may have: a few bytes can stand for any number of them."""

KEPT = 1 << 28
"""Bytes of row groups that are kept for the next image."""

_BYTES, _PATH, _LABEL = "image.bytes", "image.path", "label"


class _Group(NamedTuple):
    """A row group."""

    path: str
    number: int
    rows: int
    packed: int
    """Bytes of its images, compressed."""
    labels: list[str]
    names: list[str]
    """The last part of each image's path; empty where there is none."""


def open_parquet(urls: list[str], where: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """Parquet files, in the order of their names, as one archive.

    An image is named by its path in the file, or by its row where a path is missing or not alone.

    Raises:
        InputError: a file is not whole, lacks a column or a label, has a row group too large, or as
            `Archive`.
    """
    fs, _ = uri.filesystem(urls[0])
    groups = [group for url in urls for group in _groups(fs, uri.redact(url), uri.filesystem(url)[1])]
    found = _found(groups, class_names)
    sealed = [[group.rows, group.packed] for group in groups]
    return Archive(where, found, _Groups(fs, groups).fetch, class_names, sealed)


def _found(groups: list[_Group], class_names: tuple[str, ...] | None) -> list[Found]:
    rows = [
        (label, name, (number, row))
        for number, group in enumerate(groups)
        for row, (label, name) in enumerate(zip(group.labels, group.names, strict=True))
    ]
    classes = numbered({label for label, _, _ in rows}, class_names)
    if not all(name for _, name, _ in rows) or len({(label, name) for label, name, _ in rows}) < len(rows):
        rows = [(label, f"{row:09d}", place) for row, (label, _, place) in enumerate(rows)]
    return [Found(classes[label], name, None, place) for label, name, place in rows]


def _groups(fs: fsspec.AbstractFileSystem, where: str, path: str) -> Iterator[_Group]:
    try:
        with fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            names = _class_names(where, parquet)
            for number in range(parquet.num_row_groups):
                yield _group(where, path, parquet, number, names)
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file of images") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{where}: not a whole Parquet file ({first_line(error)}); fetch it again") from error


def _class_names(where: str, parquet: pq.ParquetFile) -> list[str] | None:
    """The names of the labels in Hugging Face's metadata, None without."""
    columns = [parquet.schema.column(index).path for index in range(len(parquet.schema))]
    missing = [column for column in (_BYTES, _LABEL) if column not in columns]
    if missing:
        raise InputError(f"{where}: has no column {missing[0]!r}, only {', '.join(columns)[:200]}; rename yours")
    try:
        features = json.loads((parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = [str(name) for name in features[_LABEL]["names"]]
    except (KeyError, TypeError, ValueError):
        return None  # not written by Hugging Face's library, or no ClassLabel: the labels speak for themselves
    if len(set(names)) < len(names):
        raise InputError(f"{where}: two classes of one name in its metadata; rename one")
    return names


def _group(where: str, path: str, parquet: pq.ParquetFile, number: int, names: list[str] | None) -> _Group:
    about = parquet.metadata.row_group(number)
    columns = [about.column(index) for index in range(about.num_columns)]
    images = next(column for column in columns if column.path_in_schema == _BYTES)
    if images.total_uncompressed_size > MAX_GROUP or about.num_rows > MAX_ROWS:
        text = f"{about.num_rows:,} rows with {images.total_uncompressed_size:,} bytes of images"
        most = f"more than {MAX_ROWS:,} or {MAX_GROUP:,}"
        raise InputError(f"{where}: row group {number} has {text}, {most}; write it with smaller ones")
    wanted = [column.path_in_schema for column in columns if column.path_in_schema in (_PATH, _LABEL)]
    rows = parquet.read_row_group(number, columns=wanted, use_threads=False).to_pylist()
    labels = [_label(f"{where}: row group {number}", row[_LABEL], names) for row in rows]
    paths = [str((row.get("image") or {}).get("path") or "").rpartition("/")[2] for row in rows]
    return _Group(path, number, len(rows), images.total_compressed_size, labels, paths)


def _label(where: str, label: Any, names: list[str] | None) -> str:
    if isinstance(label, str) and label:
        return label
    if not isinstance(label, int) or not 0 <= label < (len(names) if names is not None else 1 << 31):
        raise InputError(f"{where}: {label!r} is no label; leave out rows without one")
    return str(label) if names is None else names[label]


class _Groups:
    """The images of row groups, of which the last that were read are kept."""

    def __init__(self, fs: fsspec.AbstractFileSystem, groups: list[_Group]) -> None:
        self._fs, self._groups = fs, groups
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = Lock()

    def fetch(self, place: tuple[int, int]) -> bytes:
        number, row = place
        with self._lock:
            images = self._kept.get(number)
            if images is not None:
                self._kept.move_to_end(number)
        if images is None:
            images = self._read(number)
        data = images[row].as_py()
        if not isinstance(data, bytes):
            raise ValueError("the row holds no bytes, perhaps only a path")
        return data

    def _read(self, number: int) -> pa.ChunkedArray:
        group = self._groups[number]
        with self._fs.open(group.path, "rb") as file:
            parquet = pq.ParquetFile(file, read_dictionary=[_BYTES])  # so that bytes stored once are held once
            table = parquet.read_row_group(group.number, columns=[_BYTES], use_threads=False)
        images = pa.chunked_array([chunk.field("bytes") for chunk in table["image"].chunks])
        with self._lock:
            self._kept[number] = images
            while sum(kept.nbytes for kept in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
        return images
