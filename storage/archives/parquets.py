"""Parquet files with a column of encoded images and one of labels, as Hugging Face's datasets or Spark write them.

A Parquet footer gives neither the size nor the position of an image. So the digest covers the size of
each row group instead of those of its images, and to read an image is to read its row group. The row
groups that were read last are cached.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Iterator
from threading import Lock
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from storage import uri
from storage.archives.account import Account, check_one_split, check_splits
from storage.archives.listing import Archive, ListedFile, class_names_of, first_line
from storage.errors import InputError

MAX_GROUP = 1 << 31
"""Largest row group: bytes of its images, uncompressed."""

MAX_ROWS = 1 << 20
"""Largest row group: rows. A few compressed bytes can stand for any number of rows."""

CACHE_BYTES = 1 << 28
"""Bytes of row groups that are cached."""

_IMAGES, _LABEL = ("image", "img"), "label"
_SPLIT = "split"
_LABEL_KINDS = (
    *(pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating),
    *(pa.types.is_string, pa.types.is_large_string),
)
_LIKE_LABELS = re.compile(r"(.*_)?(labels?|class)")


class _Columns(NamedTuple):
    """The columns that are read, by their paths in a file's schema."""

    image: str
    """The column of images: of bytes, or of bytes and a path."""
    data: str
    """The images' bytes."""
    path: str
    """The images' paths; the file may have none."""
    label: str
    names: list[str] | None
    """The class of each label, which is a number; None if the labels are the classes."""
    numbered: bool
    """Whether the classes are numbers."""


class _Group(NamedTuple):
    """A row group without its images."""

    path: str
    columns: _Columns
    number: int
    rows: int
    compressed: int
    """Bytes of its images, compressed."""
    labels: list[str]
    names: list[str]
    """The last part of each image's path; empty if there is no path."""
    splits: frozenset[str]
    """What a column ``split`` holds; empty without one."""


def open_parquet(urls: list[str], account: Account, class_names: tuple[str, ...] | None = None) -> Archive:
    """Parquet files as one archive, their rows in the order of the URLs.

    An image is named by its path in the file. If a path is missing or is not unique, all images are
    named by their row numbers instead.

    Raises:
        InputError: a file is damaged, lacks a column or a label, has a row group too large or rows of several
            splits, or as `Archive`.
    """
    check_one_split(account.where, [url.rpartition("/")[2] for url in urls])
    fs, _ = uri.filesystem(urls[0])
    groups = [group for url in urls for group in _groups(url)]
    _check_class_names(account, groups)
    check_splits(account.where, frozenset[str]().union(*(group.splits for group in groups)))
    files = _listed(groups, class_names)
    content = [[group.rows, group.compressed] for group in groups]
    return Archive(account, files, _Groups(fs, groups).fetch, class_names, content)


def _check_class_names(account: Account, groups: list[_Group]) -> None:
    """Check that the classes are names in all files or in none, since numbers beside names would be further classes.

    Raises:
        InputError: some files have numbers.
    """
    numbered, named = (
        [group.path for group in groups if group.labels and group.columns.numbered is kind] for kind in (True, False)
    )
    if numbered and named:
        name = numbered[0].rpartition("/")[2]
        raise account.refused(name, "has numbers as classes, and other files have names; write the names there too")


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
            columns = _columns(where, parquet.schema_arrow)
            for number in range(parquet.num_row_groups):
                yield _group(where, path, parquet, number, columns)
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        damage = f"damaged or not a Parquet file ({first_line(error)}); fetch it again"
        raise InputError(f"{where}: {uri.stand_in(url) or damage}") from error


def _columns(where: str, schema: pa.Schema) -> _Columns:
    """The columns of images and labels: those with the usual names, or the only ones that can be meant.

    Raises:
        InputError: there is no such column, several can be meant, or two classes have the same name.
    """
    features, fields = _features(schema), {field.name: field.type for field in schema}
    structs = [name for name, kind in fields.items() if _has_bytes(kind)]
    bare = [name for name, kind in fields.items() if _is_bytes(kind)]
    image = _chosen(where, schema, "encoded images", _IMAGES, structs + bare)
    classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel" and name in fields]
    alike = [name for name in fields if _LIKE_LABELS.fullmatch(name)]
    label = _LABEL if _LABEL in fields else _chosen(where, schema, "labels", (_LABEL,), classes or alike)
    if not any(is_kind(_plain(fields[label])) for is_kind in _LABEL_KINDS):
        problem = f"the column {label!r} holds {fields[label]}; a label is a number or a text"
        raise InputError(f"{where}: {problem}".replace("\n", " "))
    names = _class_names(where, features.get(label, {}))
    numbered = names is None and pa.types.is_integer(fields[label])
    return _Columns(image, f"{image}.bytes" if image in structs else image, f"{image}.path", label, names, numbered)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _has_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type))


def _chosen(where: str, schema: pa.Schema, what: str, usual: tuple[str, ...], possible: list[str]) -> str:
    """The column with a usual name, or else the only one that is possible."""
    named = [name for name in usual if name in possible]
    if named or len(possible) == 1:
        return (named or possible)[0]
    found = f"several columns of {what}, {', '.join(possible)}" if possible else f"no column of {what}"
    columns = f"(its columns: {', '.join(schema.names)[:200]})"
    raise InputError(f"{where}: has {found}; name the one to use {usual[0]!r} {columns}")


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """The columns as Hugging Face's library describes them in the metadata; empty if it has not written the file."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {str(name): feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _class_names(where: str, feature: dict[str, Any]) -> list[str] | None:
    names = feature.get("names")
    if not isinstance(names, list):
        return None  # no ClassLabel: the labels are the names
    if len(set(map(str, names))) < len(names):
        raise InputError(f"{where}: two classes in its metadata have the same name; rename one")
    return [str(name) for name in names]


def _group(where: str, path: str, parquet: pq.ParquetFile, number: int, read: _Columns) -> _Group:
    metadata = parquet.metadata.row_group(number)
    columns = [metadata.column(index) for index in range(metadata.num_columns)]
    images = next(column for column in columns if column.path_in_schema == read.data)
    if images.total_uncompressed_size > MAX_GROUP or metadata.num_rows > MAX_ROWS:
        size = f"{metadata.num_rows:,} rows with {images.total_uncompressed_size:,} bytes of images"
        limit = f"more than the limit of {MAX_ROWS:,} rows or {MAX_GROUP:,} bytes"
        raise InputError(f"{where}: row group {number} has {size}, {limit}; write the file with smaller row groups")
    _check_nulls(f"{where}: row group {number}", images, metadata.num_rows)
    wanted = [column.path_in_schema for column in columns if column.path_in_schema in (read.path, read.label, _SPLIT)]
    rows = parquet.read_row_group(number, columns=wanted, use_threads=False).to_pylist()
    labels = [_label(f"{where}: row group {number}", row[read.label], read.names) for row in rows]
    paths = [str((row.get(read.image) or {}).get("path") or "").rpartition("/")[2] for row in rows]
    splits = frozenset(str(row[_SPLIT]) for row in rows if row.get(_SPLIT))
    return _Group(path, read, number, len(rows), images.total_compressed_size, labels, paths, splits)


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
        image, data = group.columns.image, group.columns.data
        with self._fs.open(group.path, "rb") as file:
            parquet = pq.ParquetFile(file, read_dictionary=[data])  # repeated bytes are held once
            chunks = parquet.read_row_group(group.number, columns=[data], use_threads=False)[image].chunks
        images = pa.chunked_array(chunks if data == image else [chunk.field("bytes") for chunk in chunks])
        with self._lock:
            self._cache[number] = images
            while sum(group.nbytes for group in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        return images
