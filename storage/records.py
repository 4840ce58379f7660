"""Commit records: each marks one unit of a stage's work as done.

A unit writes its objects and then its record, which ends in its own hash. A unit is done again by the same command
if it has no record, or one that is damaged, does not match its objects, or was made from other bytes of a parent. All
other units are kept.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from pydantic import Field

from storage import uri
from storage.config import Config
from storage.errors import StorageError
from storage.header import FileEntry
from storage.manifest import StageOutput
from storage.seal import opened, sealed

FOLDER = "records"
"""Folder of the records, below the stage's folder."""


class Record(Config):
    """The objects that one unit has written."""

    files: tuple[FileEntry, ...]
    """The objects with size and hash."""
    parents: dict[str, str] = Field(default_factory=dict)
    """`Manifest.content` of each parent that the unit was made from, by name."""


AnyRecord = TypeVar("AnyRecord", bound=Record)


def load(out: StageOutput, path: str, kind: type[AnyRecord]) -> AnyRecord | None:
    """The record of a finished unit; None if the unit is to be done again.

    Raises:
        StorageError: the record exists and cannot be read.
    """
    data = uri.read_if_there(out.url(path))
    try:
        record = None if data is None else parse(data, kind)
    except ValueError:
        return None
    if record is None:
        return None
    matches = all(uri.size(out.url(entry.path)) == entry.size for entry in record.files)
    return record if matches and record.parents == out.header.contents else None


def parse(data: bytes, kind: type[AnyRecord]) -> AnyRecord:
    """The record in a file.

    Raises:
        ValueError: the file is damaged, or no record of this kind.
    """
    return kind.model_validate_json(opened(data))


def commit(out: StageOutput, path: str, record: Record, *, replace: bool) -> None:
    """Write the record of a unit whose objects are written.

    Args:
        out: the stage's output.
        path: path of the record.
        record: the record.
        replace: replace an old record that did not match its objects. Otherwise the record is created
            exclusively, so that two runs of the same unit notice each other.

    Raises:
        StorageError: another run has meanwhile committed other bytes for the unit, or the record
            cannot be written.
    """
    data = sealed(record.model_copy(update={"parents": out.header.contents}).model_dump_json().encode())
    if replace:
        uri.write(out.url(path), data)
    elif not uri.create(out.url(path), data):
        where = uri.redact(out.url(path))
        raise StorageError(f"{where}: another run committed other bytes at the same time; delete it and run again")


def load_all(out: StageOutput, paths: Iterable[str], kind: type[AnyRecord]) -> Iterator[tuple[AnyRecord, FileEntry]]:
    """All records of a stage in turn, each checked against its objects, with the record's own file entry.

    Raises:
        StorageError: a unit is not committed.
    """
    for path in paths:
        record = load(out, path, kind)
        if record is None:
            raise StorageError(f"{uri.redact(out.url(path))}: not committed; run the same command again")
        yield record, out.describe(path)
