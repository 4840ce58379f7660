"""Commit records: each marks one unit of a stage's work as done.

A unit writes its objects and then its record. A unit without a record, or with a record that does not
match its objects, is done again by the same command; all other units are kept.
"""

from typing import TypeVar

from pydantic import ValidationError

from storage import uri
from storage.config import Config
from storage.errors import StorageError
from storage.header import FileEntry
from storage.manifest import StageOutput

FOLDER = "records"
"""Folder of the records, below the stage's folder."""


class Record(Config):
    """The objects that one unit has written."""

    files: tuple[FileEntry, ...]
    """The objects with size and hash."""


AnyRecord = TypeVar("AnyRecord", bound=Record)


def load(out: StageOutput, path: str, kind: type[AnyRecord]) -> AnyRecord | None:
    """The record of a finished unit; None if it is missing or damaged, or an object has another size.

    Raises:
        StorageError: the record exists and cannot be read.
    """
    if not uri.exists(out.url(path)):
        return None
    try:
        record = kind.model_validate_json(uri.read(out.url(path)))
    except ValidationError:
        return None
    matches = all(uri.size(out.url(entry.path)) == entry.size for entry in record.files)
    return record if matches else None


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
    data = record.model_dump_json().encode()
    if replace:
        uri.write(out.url(path), data)
    elif not uri.create(out.url(path), data) and uri.read(out.url(path)) != data:
        where = uri.redact(out.url(path))
        raise StorageError(f"{where}: another run committed other bytes at the same time; delete it and run again")


def load_all(out: StageOutput, paths: list[str], kind: type[AnyRecord]) -> list[tuple[AnyRecord, FileEntry]]:
    """All records of a stage, each checked against its objects, with the record's own file entry.

    Raises:
        StorageError: a unit is not committed.
    """
    committed = []
    for path in paths:
        record = load(out, path, kind)
        if record is None:
            raise StorageError(f"{uri.redact(out.url(path))}: not committed; run the same command again")
        committed.append((record, out.describe(path)))
    return committed
