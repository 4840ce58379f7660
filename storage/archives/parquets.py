"""Parquet files as Hugging Face's datasets write them: a column of encoded images and one of labels.

A Parquet footer gives neither the size nor the position of an image. So the digest covers the size of
each row group instead of those of its images, and to read an image is to read its row group. The row
groups that were read last are cached.
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
from storage.archives.account import Account, check_one_split
from storage.archives.listing import Archive, ListedFile, class_names_of, first_line
from storage.errors import InputError

MAX_GROUP = 1 << 31
"""Largest row group: bytes of its images, uncompressed."""

MAX_ROWS = 1 << 20
"""Largest row group: rows. A few compressed bytes can stand for any number of rows."""

CACHE_BYTES = 1 << 28
"""Bytes of row groups that are cached."""

_BYTES, _PATH, _LABEL = "image.bytes", "image.path", "label"


class _Group(NamedTuple):
    """A row group without its images."""

    path: str
    number: int
    rows: int
    compressed: int
    """Bytes of its images, compressed."""
    labels: list[str]
    has_class_names: bool
    """Whether the labels are class names from the metadata."""
    names: list[str]
    """The last part of each image's path; empty if there is no path."""


def open_parquet(urls: list[str], account: Account, class_names: tuple[str, ...] | None = None) -> Archive:
    """Parquet files as one archive, their rows in the order of the URLs.

    An image is named by its path in the file. If a path is missing or is not unique, all images are
    named by their row numbers instead.

    Raises:
        InputError: a file is damaged, lacks a column or a label, has a row group too large, or as
            `Archive`.
    """
    check_one_split(account.where, [url.rpartition("/")[2] for url in urls])
    fs, _ = uri.filesystem(urls[0])
    groups = [group for url in urls for group in _groups(url)]
    _check_class_names(account, groups)
    files = _listed(groups, class_names)
    content = [[group.rows, group.compressed] for group in groups]
    return Archive(account, files, _Groups(fs, groups).fetch, class_names, content)


def _check_class_names(account: Account, groups: list[_Group]) -> None:
    """Check that class names are in all files or in none, since numbers beside names would be further classes.

    Raises:
        InputError: some files have none.
    """
    without = [group.path for group in groups if not group.has_class_names]
    if 0 < len(without) < len(groups):
        name = without[0].rpartition("/")[2]
        raise account.refused(name, "has no class names in its metadata, as other files have; write them there")


def _listed(groups: list[_Group], class_names: tuple[str, ...] | None) -> list[ListedFile]:
    rows = [
        (label, name, (number, row))
        for number, group in enumerate(groups)
        for row, (label, name) in enumerate(zip(group.labels, group.names, strict=True))
    ]
    classes = class_names_of({label for label, _, _ in rows}, class_names)
    if not all(name for _, name, _ in rows) or len({(label, name) for label, name, _ in rows}) < len(rows):
        rows = [(label, f"{row:09d}", location) for row, (label, _, location) in enumerate(rows)]
    return [ListedFile(classes[label], name, None, location) for label, name, location in rows]


def _groups(url: str) -> Iterator[_Group]:
    (fs, path), where = uri.filesystem(url), uri.redact(url)
    try:
        with fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            names = _class_names(where, parquet)
            for number in range(parquet.num_row_groups):
                yield _group(where, path, parquet, number, names)
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        damage = f"damaged or not a Parquet file ({first_line(error)}); fetch it again"
        raise InputError(f"{where}: {uri.stand_in(url) or damage}") from error


def _class_names(where: str, parquet: pq.ParquetFile) -> list[str] | None:
    """The class names in Hugging Face's metadata; None if there are none."""
    columns = [parquet.schema.column(index).path for index in range(len(parquet.schema))]
    missing = [column for column in (_BYTES, _LABEL) if column not in columns]
    if missing:
        raise InputError(f"{where}: has no column {missing[0]!r}, only {', '.join(columns)[:200]}; rename its columns")
    try:
        features = json.loads((parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = [str(name) for name in features[_LABEL]["names"]]
    except (KeyError, TypeError, ValueError):
        return None  # not written by Hugging Face's library, or no ClassLabel: the labels are the names
    if len(set(names)) < len(names):
        raise InputError(f"{where}: two classes in its metadata have the same name; rename one")
    return names


def _group(where: str, path: str, parquet: pq.ParquetFile, number: int, names: list[str] | None) -> _Group:
    metadata = parquet.metadata.row_group(number)
    columns = [metadata.column(index) for index in range(metadata.num_columns)]
    images = next(column for column in columns if column.path_in_schema == _BYTES)
    if images.total_uncompressed_size > MAX_GROUP or metadata.num_rows > MAX_ROWS:
        size = f"{metadata.num_rows:,} rows with {images.total_uncompressed_size:,} bytes of images"
        limit = f"more than the limit of {MAX_ROWS:,} rows or {MAX_GROUP:,} bytes"
        raise InputError(f"{where}: row group {number} has {size}, {limit}; write the file with smaller row groups")
    _check_nulls(f"{where}: row group {number}", images, metadata.num_rows)
    wanted = [column.path_in_schema for column in columns if column.path_in_schema in (_PATH, _LABEL)]
    rows = parquet.read_row_group(number, columns=wanted, use_threads=False).to_pylist()
    labels = [_label(f"{where}: row group {number}", row[_LABEL], names) for row in rows]
    paths = [str((row.get("image") or {}).get("path") or "").rpartition("/")[2] for row in rows]
    return _Group(path, number, len(rows), images.total_compressed_size, labels, names is not None, paths)


def _check_nulls(where: str, images: pq.ColumnChunkMetaData, rows: int) -> None:
    """Check, as far as the file has statistics, that every row has image bytes.

    Raises:
        InputError: rows have none.
    """
    statistics = images.statistics
    if statistics is not None and statistics.has_null_count and statistics.null_count:
        raise InputError(f"{where}: {statistics.null_count:,} of {rows:,} rows have no image bytes; remove them")


def _label(where: str, label: Any, names: list[str] | None) -> str:
    if isinstance(label, str) and label:
        return label
    if not isinstance(label, int) or not 0 <= label < (len(names) if names is not None else 1 << 31):
        raise InputError(f"{where}: {label!r} is not a label; remove rows without a label")
    return str(label) if names is None else names[label]


class _Groups:
    """Reads images by row groups, and caches those that were read last."""

    def __init__(self, fs: fsspec.AbstractFileSystem, groups: list[_Group]) -> None:
        self._fs, self._groups = fs, groups
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = Lock()

    def fetch(self, place: tuple[int, int]) -> bytes:
        number, row = place
        with self._lock:
            images = self._cache.get(number)
            if images is not None:
                self._cache.move_to_end(number)
        if images is None:
            images = self._read(number)
        data = images[row].as_py()
        if not isinstance(data, bytes):
            raise ValueError("the row holds no image bytes, perhaps only a path")
        return data

    def _read(self, number: int) -> pa.ChunkedArray:
        group = self._groups[number]
        with self._fs.open(group.path, "rb") as file:
            parquet = pq.ParquetFile(file, read_dictionary=[_BYTES])  # repeated bytes are held once
            table = parquet.read_row_group(group.number, columns=[_BYTES], use_threads=False)
        images = pa.chunked_array([chunk.field("bytes") for chunk in table["image"].chunks])
        with self._lock:
            self._cache[number] = images
            while sum(group.nbytes for group in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        return images
